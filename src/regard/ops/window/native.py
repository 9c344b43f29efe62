"""Windows by the native kernels of block-sparse attention: a window is a list of keys.

Of a sequence every block of queries attends to one block, all keys, within its reach. On a grid a
tile of queries attends to the box of keys that any of them sees, with a mask of who sees which:
tiles that see boxes of the same shape in the same way share it. Places that lie a step of a
dilation apart have nothing to do with those between them, which are other rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from regard.core.attention_pair import attention_pair
from regard.ops.block_sparse.native import walk
from regard.ops.block_sparse.native.library import BOXES
from regard.ops.block_sparse.native.walk import Lists
from regard.ops.window.axes import Side, Window, sides

SEQUENCE_TILE = 144  # queries that share their keys; a multiple of every kernel's tile
LANES = 48  # queries of the largest kernel's tile: rows of masks are filled up to hold a whole one
VECTOR = 16  # queries that cost as much as one
PACKING = 12  # a key of a box costs as much as so many queries that look at it
_SIDES = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # of a tile along an axis
_OP = "window_attention"


@lru_cache(maxsize=64)
def best_tile(grid: tuple[int, ...], windows: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """The sides of a tile that cost least: keys of its box, times what each of them costs."""

    def cost(tile: tuple[int, ...]) -> float:
        keys = 1
        for size, side, (left, right) in zip(grid, tile, windows, strict=True):
            width = size if left < 0 or right < 0 else left + right + side
            keys *= min(width, size)
        queries = math.prod(tile)
        return keys * (-(-queries // VECTOR) * VECTOR + PACKING) / queries

    choices = [tuple(dict.fromkeys(min(side, size) for side in _SIDES)) for size in grid]
    return min(product(*choices), key=cost)


def attend_sequence(
    op: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, reach: tuple[int, int],
    tile: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """A sequence by `op`, the native op of block-sparse attention."""
    T, S = q.shape[2], k.shape[2]
    block = min(tile or SEQUENCE_TILE, T)
    whole = torch.ones(1, 1, -(-T // block), 1, dtype=torch.int8, device=q.device)
    return op(q, k, v, bias, whole, False, block, S, S, *reach, False, scale)[0]


def by_step(x: Tensor, grid: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """x [B, h, N, X] on a grid of multiples of the dilation as [B steps, h, N / steps, X]."""
    axes = len(grid)
    parts = [part for n, d in zip(grid, dilation, strict=True) for part in (n // d, d)]
    x = x.unflatten(2, parts)
    steps, places = range(3, 3 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
    x = x.permute(0, *steps, 1, *places, x.dim() - 1)
    return x.flatten(0, axes).flatten(2, -2)


def from_steps(x: Tensor, grid: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """The inverse of `by_step`."""
    axes = len(grid)
    x = x.unflatten(0, (-1, *dilation)).unflatten(
        -2, [n // d for n, d in zip(grid, dilation, strict=True)]
    )
    # batch, steps, head, places, X
    pairs = [axis for i in range(axes) for axis in (2 + axes + i, 1 + i)]
    return x.permute(0, 1 + axes, *pairs, x.dim() - 1).flatten(2, -2)


@lru_cache(maxsize=16)
def boxes(grid: tuple[int, ...], windows: tuple[Window, ...], tile: tuple[int, ...]) -> Lists:
    """The boxes of all tiles of a grid in raster order as lists."""
    axes = [
        sides(size, size, window, side)
        for size, window, side in zip(grid, windows, tile, strict=True)
    ]
    queries = math.prod(tile)
    width = -(-(queries + LANES) // VECTOR) * VECTOR
    order, starts, offsets, lengths, mask_at = [], [], [0], [], []
    masks: list[Tensor] = []
    known: dict[Any, int] = {}
    filled, pairs = 0, 0
    for box in product(*axes):
        order.append(_queries(box, grid, tile))
        *outer, last = [torch.arange(side.low, side.high) for side in box]
        lines = _flat([*outer, last[:1]], grid)
        starts.append(lines)
        lengths.append(torch.full_like(lines, len(last)))
        offsets.append(offsets[-1] + len(lines))
        pairs += len(lines) * len(last) * queries
        if all(side.seen is None for side in box):
            mask_at.append(-1)
            continue
        shape = tuple((side.high - side.low, side.seen) for side in box)
        if shape not in known:
            seen = _seen(box, tile)
            mask = torch.zeros(seen.shape[1], width, dtype=torch.int8)
            mask[:, :queries] = -seen.T.to(torch.int8)
            known[shape] = filled
            masks.append(mask)
            filled += mask.numel()
        mask_at.append(known[shape])
    numbers = {
        "kind": BOXES, "plan_batch": 1, "plan_heads": 1, "lists": len(order), "width": 0,
        "keys": math.prod(grid), "block_q": queries, "block_k": 1, "left": -1, "right": -1,
        "replicate": 0, "pools": 0, "mask_width": width,
    }  # fmt: skip
    tensors: dict[str, Tensor | None] = {
        "order": torch.cat(order).to(torch.int32),
        "offsets": torch.tensor(offsets),
        "start": torch.cat(starts).to(torch.int32),
        "length": torch.cat(lengths).to(torch.int32),
        "mask_at": torch.tensor(mask_at),
        "masks": torch.cat(masks) if masks else None,
    }
    return Lists(numbers, tensors, pairs)


def _flat(coordinates: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """The raster indices of a product of coordinates."""
    total = torch.zeros((), dtype=torch.long)
    for values, size in zip(coordinates, grid, strict=True):
        total = total[..., None] * size + values
    return total.flatten()


def _queries(box: tuple[Side, ...], grid: tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """The query at every place of a tile; -1 where it sticks out of the grid."""
    places = [side.start + torch.arange(length) for side, length in zip(box, tile, strict=True)]
    inside = torch.ones((), dtype=torch.bool)
    for place, size in zip(places, grid, strict=True):
        inside = inside[..., None] & (place < size)
    return torch.where(inside.flatten(), _flat(places, grid), -1)


def _seen(box: tuple[Side, ...], tile: tuple[int, ...]) -> Tensor:
    """[queries, keys]: which keys of the box a query sees."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for side, length in zip(box, tile, strict=True):
        keys = torch.arange(side.high - side.low)
        reach = side.seen or ((0, len(keys)),) * length
        own = torch.stack([(keys >= a) & (keys <= b) for a, b in reach])
        seen = (seen[:, None, :, None] & own[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return seen


def _lists(
    grid: Sequence[int], left: Sequence[int], right: Sequence[int], inward: bool,
    tile: Sequence[int],
) -> Lists:  # fmt: skip
    windows = tuple(Window(a, b, inward) for a, b in zip(left, right, strict=True))
    return boxes(tuple(grid), windows, tuple(tile))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    *rest, scale = settings
    found = walk.forward(_OP, q, k, v, bias, _lists(*rest), scale)
    assert found is not None  # boxes are no plan that could be wrong
    return found


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *rest, scale = settings
    return walk.backward(_OP, d_out, out, lse, q, k, v, bias, _lists(*rest), scale)


window_native = attention_pair(
    "window_native",
    "Tensor q, Tensor k, Tensor v, Tensor? bias, int[] grid, int[] left, int[] right, "
    "bool inward, int[] tile, float scale",
    _forward,
    _backward,
    gradients=4,
)
