"""Attention of the blocks of a map to the blocks with a halo, as a pair of torch operators.

Keys and values are maps with the halo around them. The windows of some blocks at a time are
copied side by side; what depends on the place of a key in its window is part of the queries: with
the unit vectors of the row and of the column behind each key, the product of both is the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.attention_pair import attention_pair
from regard.ops.block_sparse.tile import attend, gradients

# Numbers gathered at a time, and scores held at a time: 2 MB each in float32.
GATHERED = 1 << 19

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, int block, int halo, SymInt[] inside"


class Part(NamedTuple):
    """Maps [n0, n1), rows of blocks [u0, u1), columns of blocks [v0, v1)."""

    maps: slice
    rows: slice
    columns: slice


class Windows:
    """The windows of q [N, U, V, m, D + 2 win | D] over k [N, hp, wp, D] and v [N, hp, wp, Dv].

    inside: (height, width) of the real keys; (-1, -1) if all count, the zeros around them too.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block: int, halo: int, inside: Any) -> None:
        self.block, self.halo, self.inside = block, halo, inside
        self.side = block + 2 * halo
        self.keys, self.width = self.side * self.side, q.shape[4]
        self.shape = q.shape[:3]
        per_block = self.keys * max(self.width + v.shape[3], 2 * q.shape[3])
        self.together = max(1, GATHERED // per_block)
        self.placed: Tensor | None = None

    def parts(self) -> Iterator[Part]:
        """All blocks, as many at a time as fit."""
        N, U, V = self.shape
        columns = min(V, self.together)
        rows = min(U, max(1, self.together // max(columns, 1)))
        maps = min(N, max(1, self.together // max(columns * rows, 1)))
        for n in range(0, N, maps or 1):
            for u in range(0, U, rows or 1):
                for c in range(0, V, columns or 1):
                    ends = min(n + maps, N), min(u + rows, U), min(c + columns, V)
                    yield Part(slice(n, ends[0]), slice(u, ends[1]), slice(c, ends[2]))

    def view(self, x: Tensor, part: Part, side: tuple[int, int], at: tuple[int, int]) -> Tensor:
        """[n, u, v, *side, X]: from place `at` of the windows on, without a copy."""
        x = x[part.maps]
        for axis, blocks, size, start in zip((1, 2), part[1:], side, at, strict=True):
            length = (blocks.stop - blocks.start - 1) * self.block + size
            x = x.narrow(axis, blocks.start * self.block + start, length)
            x = x.unfold(axis, size, self.block)
        return x.permute(0, 1, 2, 4, 5, 3)

    def gathered(self, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Keys [blocks, win * win, D + 2 win | D] and values [blocks, win * win, Dv]."""
        values = self.view(v, part, (self.side, self.side), (0, 0))
        shape = values.shape[:3]
        count, D = math.prod(shape), k.shape[3]
        if self.placed is None or len(self.placed) < count:
            self.placed = k.new_zeros(count, self.keys, self.width)
            if self.width > D:
                place = torch.arange(self.keys, device=k.device)
                row, column = place // self.side, place % self.side
                self.placed[:, place, D + row] = 1.0
                self.placed[:, place, D + self.side + column] = 1.0
        keys = self.placed[:count]
        target = keys.view(*shape, self.side, self.side, self.width)[..., :D]
        target.copy_(self.view(k, part, (self.side, self.side), (0, 0)))
        return keys, values.reshape(count, self.keys, -1)

    def spread(self, windows: Tensor, into: Tensor, part: Part) -> None:
        """Adds windows [blocks, win * win, X] to the places of a map that they come from."""
        shape = [piece.stop - piece.start for piece in part]
        whole = windows.view(*shape, self.side, self.side, -1)
        # Parts of windows that are at most a block wide do not overlap.
        for row in range(0, self.side, self.block):
            for column in range(0, self.side, self.block):
                ends = min(row + self.block, self.side), min(column + self.block, self.side)
                size = ends[0] - row, ends[1] - column
                target = self.view(into, part, size, (row, column))
                target += whole[:, :, :, row : ends[0], column : ends[1]]

    def hidden(self, part: Part, like: Tensor) -> Tensor | None:
        """[blocks, 1, win * win]: the places around the map."""
        if self.inside[0] < 0:
            return None
        seen = []
        for blocks, size in zip(part[1:], self.inside, strict=True):
            first = torch.arange(blocks.start, blocks.stop, device=like.device) * self.block
            place = first[:, None] + torch.arange(self.side, device=like.device) - self.halo
            seen.append((place >= 0) & (place < size))
        rows, columns = seen
        outside = ~(rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1).flatten(1)
        return outside.repeat(part.maps.stop - part.maps.start, 1)[:, None]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, block: int, halo: int, inside: list[int]
) -> tuple[Tensor, Tensor]:
    windows = Windows(q, k, v, block, halo, inside)
    out, lse = q.new_empty(*q.shape[:4], v.shape[3]), q.new_empty(q.shape[:4])
    for part in windows.parts():
        keys, values = windows.gathered(k, v, part)
        block_q = q[part].flatten(0, 2)
        rows, top = attend(block_q, keys, values, windows.hidden(part, q))
        out[part] = rows.view(out[part].shape)
        lse[part] = top.view(lse[part].shape)
    return out, lse


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    block: int, halo: int, inside: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    windows = Windows(q, k, v, block, halo, inside)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for part in windows.parts():
        keys, values = windows.gathered(k, v, part)
        rows = [x[part].flatten(0, 2) for x in (d_out, q, out, lse)]
        found = gradients(
            rows[0], rows[1], keys, values, windows.hidden(part, q), rows[2], rows[3][..., None]
        )  # fmt: skip
        dq[part] = found[0].view(dq[part].shape)
        windows.spread(found[1][..., : k.shape[3]], dk, part)
        windows.spread(found[2], dv, part)
    return dq, dk, dv


halo_blocks = attention_pair("halo", _ARGUMENTS, _forward, _backward)
