"""A call cut into tiles that stay in a processor's cache, for forms without an order of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 1 << 17  # of a tile: half a megabyte in float32
FEWEST = 64  # tokens of a tile, however wide they are


class Tile(NamedTuple):
    """Batch rows [b0, b1), key heads [h0, h1), tokens [t0, t1)."""

    b0: int
    b1: int
    h0: int
    h1: int
    t0: int
    t1: int

    def tokens(self, x: Tensor) -> Tensor:
        """Of x [B, Hk, G, T, c], or [B, Hk, T, c] for G = 1: [n, G t, c], a copy if it must be."""
        part = x[self.b0 : self.b1, self.h0 : self.h1, ..., self.t0 : self.t1, :]
        return part.reshape((self.b1 - self.b0) * (self.h1 - self.h0), -1, x.shape[-1])

    def write(self, x: Tensor, rows: Tensor) -> None:
        """The inverse of `tokens`, into x."""
        part = x[self.b0 : self.b1, self.h0 : self.h1, ..., self.t0 : self.t1, :]
        part.copy_(rows.reshape(part.shape))

    def room(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`tokens` as a view to write into, or None where they are no such view, or of another
        dtype: what is written must then be made elsewhere."""
        part = x[self.b0 : self.b1, self.h0 : self.h1, ..., self.t0 : self.t1, :]
        if x.dtype != dtype or not part.is_contiguous():
            return None
        return part.view((self.b1 - self.b0) * (self.h1 - self.h0), -1, x.shape[-1])

    def heads(self, x: Tensor) -> Tensor:
        """Of a contiguous x [B, Hk, ...]: a view [n, ...]."""
        if self.h1 - self.h0 == x.shape[1]:
            return x[self.b0 : self.b1].flatten(0, 1)
        return x[self.b0, self.h0 : self.h1]


def tiles(B: int, Hk: int, rows: int, T: int, width: int) -> Iterator[Tile]:
    """Tiles of T tokens with `rows` rows of `width` each, for B x Hk sequences.

    Several batch rows at once if they are short; else a head at a time, in runs of tokens.
    """
    if not T:
        return
    one = max(1, Hk * rows * T * width)
    if one <= ELEMENTS:
        step = ELEMENTS // one
        for b in range(0, B, step):
            yield Tile(b, min(b + step, B), 0, Hk, 0, T)
        return
    step = max(FEWEST, ELEMENTS // (rows * width))
    for b in range(B):
        for h in range(Hk):
            for t in range(0, T, step):
                yield Tile(b, b + 1, h, h + 1, t, min(t + step, T))
