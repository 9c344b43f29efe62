"""Attention within windows of a grid as a pair of torch operators.

Queries are taken tile by tile, keys by the box that a tile sees: the walk of block-sparse
attention, over boxes instead of lists of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from regard.core.attention_pair import attention_pair
from regard.ops.block_sparse import eager
from regard.ops.window.axes import Tiling, Window, tiling

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, int[] grid, int[] keys, int[] left, int[] right, "
    "bool inward, int[] tile"
)


class Boxes:
    """The pieces of a tiling, a few tiles at a time."""

    def __init__(self, tiles: Tiling) -> None:
        self.tiles, self.block_q = tiles, tiles.queries
        self.nq = tiles.geometries[-1].last if tiles.geometries else 0

    def pieces(self, plan: int, group: int, width: int) -> Iterator[eager.Piece]:
        """All tiles; the same for every head."""
        for geometry in self.tiles.geometries:
            keys = geometry.rows.shape[1]
            if not keys:  # queries before the first key
                continue
            together = max(1, eager.GATHERED // (keys * max(width, 2 * group * self.block_q)))
            for first in range(geometry.first, geometry.last, together):
                last = min(first + together, geometry.last)
                rows = geometry.rows[first - geometry.first : last - geometry.first]
                yield eager.Piece(first, last, rows, None, geometry.hidden, 0, keys)


def _tiling(
    q: Tensor, grid: Sequence[int], keys: Sequence[int], left: Sequence[int],
    right: Sequence[int], inward: bool, tile: Sequence[int],
) -> Tiling:  # fmt: skip
    windows = tuple(Window(a, b, inward) for a, b in zip(left, right, strict=True))
    found = tiling(tuple(grid), tuple(keys), windows, tuple(tile))
    if q.device.type == "cpu":
        return found
    moved = tuple(
        part._replace(
            rows=part.rows.to(q.device),
            hidden=None if part.hidden is None else part.hidden.to(q.device),
        )
        for part in found.geometries
    )
    order, filling, place = (x.to(q.device) for x in (found.order, found.filling, found.place))
    return Tiling(found.queries, order, filling, place, moved)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    tiles = _tiling(q, *settings)
    out, lse = eager.forward(q.index_select(2, tiles.order), k, v, bias, Boxes(tiles), (1, 1))
    return out.index_select(2, tiles.place), lse.index_select(2, tiles.place)


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    tiles = _tiling(q, *settings)
    d_out, out, q = (x.index_select(2, tiles.order) for x in (d_out, out, q))
    d_out = d_out.masked_fill_(tiles.filling[:, None], 0.0)
    lse = lse.index_select(2, tiles.order)
    dq, dk, dv, d_bias = eager.backward(d_out, q, k, v, bias, out, lse, Boxes(tiles), (1, 1))
    return dq.index_select(2, tiles.place), dk, dv, d_bias


window = attention_pair("window", _ARGUMENTS, _forward, _backward, gradients=4)
