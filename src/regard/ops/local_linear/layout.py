"""What a call brings, and how it is cut: parts of the heads, blocks of queries, tiles of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.decay import DecaySums
from regard.core.precision import compute_dtype
from regard.core.visibility import Visibility

TILE_KEYS = 4096  # keys of one product


@dataclass(frozen=True)
class Inputs:
    """What the registered ops receive, with the names that this folder uses.

    `ridge` [B | 1, H | 1, T | 1] and `scale` [B | 1, H | 1] are in the compute dtype.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ridge: Tensor
    scale: Tensor
    key_mask: Tensor | None
    key_bias: Tensor | None
    decay: DecaySums | None
    causal: bool
    window: tuple[int, int]
    absolute: bool
    intercept: bool = True  # False: no centring of keys and no mean
    frozen: bool = False  # the gradient holds ridge times normaliser constant: the authors'
    covariance_block: int = 0  # size of the diagonal blocks of covariances; 0: whole
    row_bias: Tensor | None = None  # [B, H, T], counted in the log-sum-exp only
    probe: Tensor | None = None  # g [B, H, T, D] where it is given instead of solved for
    average: bool = False  # g = 0: softmax attention
    wide: bool = False  # compute in float64, whatever the inputs are

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.wide else compute_dtype(self.q.dtype)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def width(self) -> int:
        """Rows and columns of the matrices that are solved with."""
        return self.covariance_block or self.q.shape[3]

    @property
    def visibility(self) -> Visibility:
        return Visibility(
            self.q.shape[2], self.k.shape[2], self.causal, self.window, self.key_mask,
            self.key_bias, self.decay, heads=self.q.shape[1], device=self.q.device,
        )

    @property
    def ridge_rows(self) -> Tensor:
        """[B, H, T, 1], a view."""
        return self.ridge.expand(self.q.shape[:3])[..., None]

    @property
    def scale_rows(self) -> Tensor:
        """[B, H, T, 1], a view."""
        return self.scale.expand(self.q.shape[:2])[:, :, None, None].expand(*self.q.shape[:3], 1)


class Part(NamedTuple):
    """Batch rows [b0, b1) and key heads [h0, h1)."""

    b0: int
    b1: int
    h0: int
    h1: int


class Hidden(NamedTuple):
    """Columns [c0, c1) of a block in which the keys at `where` are not seen."""

    c0: int
    c1: int
    where: Tensor


@dataclass(frozen=True)
class Block:
    """Queries [i0, i1) against keys [low, high), and which of those position hides."""

    i0: int
    i1: int
    low: int
    high: int
    hidden: tuple[Hidden, ...]

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Columns [c0, c1) of the products, counted from `low`."""
        count = self.high - self.low
        for c0 in range(0, count, TILE_KEYS):
            yield c0, min(c0 + TILE_KEYS, count)

    def blank(self, product: Tensor, shape: tuple[int, ...], c0: int, c1: int) -> None:
        """Zeroes hidden entries of a product over columns [c0, c1).

        Weights are zero there, but 0 * inf is not: a later key may be any finite number.
        """
        for hidden in self.hidden:
            left, right = max(c0, hidden.c0), min(c1, hidden.c1)
            if left < right:
                where = hidden.where[..., left - hidden.c0 : right - hidden.c0]
                product.view(*shape, c1 - c0)[..., left - c0 : right - c0].masked_fill_(where, 0.0)


class Workspace:
    """Named scratch memory that blocks take turns in, so that it is mapped only once."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape; the previous one of that name is given up."""
        count = 1
        for size in shape:
            count *= size
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count:
            # Causal blocks grow: a new piece for each would leave holes that none fits into.
            room = 1 << max(count - 1, 0).bit_length()
            flat = self._flat[name] = self._like.new_empty(room, dtype=self._dtype)
        return flat[:count].view(shape)
