"""Which keys a query sees, and what is added to their scores: asked tile by tile.

Every engine walks over tiles of (queries x keys). `Visibility` answers the two questions such
a walk has: which keys can matter to these queries at all (`key_range`), and what the mask and
the score bias of this tile are (`tile`). Causality, windows, padding, key biases, decays and
dense biases are all known here and nowhere else. No T x S tensor is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.decay import DecaySums


class Tile(NamedTuple):
    """`bias` is added to the scores, `mask` is True where a key is seen; None: nothing to do.

    Both broadcast against [B, H, queries, keys].
    """

    bias: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Visibility:
    """The mask and score bias of a call with `queries` x `keys`, aligned at the end.

    Query i stands at key position `i + offset`, by default `i + keys - queries`, so that the
    last query stands at the last key. Without `causal`, a decay is read as every query standing
    at the last key.

    >>> seen = Visibility(queries=2, keys=4, causal=True, window=(1, 0))
    >>> seen.key_range(0, 2), seen.tile((0, 2), (1, 4), torch.float32).mask.int().tolist()
    ((1, 4), [[[[1, 1, 0], [0, 1, 1]]]])
    """

    queries: int
    keys: int
    causal: bool = False
    window: tuple[int, int] | None = None
    key_mask: Tensor | None = None  # [B, keys]
    key_bias: Tensor | None = None  # [B, 1 | Hk | H, keys]
    decay: DecaySums | None = None  # [B, 1 | Hk | H, keys]
    bias: Tensor | None = None  # broadcasts to [B, H, queries, keys]
    heads: int = 1  # H: an operand with fewer heads lives on key heads and is repeated
    device: torch.device | str = "cpu"
    first_query: int | None = None  # its key position, where these keys are part of a sequence

    def __post_init__(self) -> None:
        for operand in (self.key_bias, self.decay.sums if self.decay is not None else None):
            if operand is not None and self.heads % operand.shape[1]:
                raise ValueError(
                    f"Visibility: heads must be a multiple of an operand's {operand.shape[1]} "
                    f"heads, got {self.heads}"
                )

    @property
    def offset(self) -> int:
        """The key position of the first query (negative if there are more queries than keys)."""
        return self.keys - self.queries if self.first_query is None else self.first_query

    @property
    def reach(self) -> tuple[int, int]:
        """How far left and right of its own position a query sees; -1 is without bound."""
        left, right = self.window if self.window is not None else (-1, -1)
        return left, 0 if self.causal else right

    @property
    def trivial(self) -> bool:
        """Whether every query sees every key with nothing added."""
        operands = (self.key_mask, self.key_bias, self.decay, self.bias)
        cut_left, cut_right = self._cuts(0, self.queries, 0, self.keys)
        return not (cut_left or cut_right) and all(operand is None for operand in operands)

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """The keys [first, last) that queries [start, stop) can see by position: host integers."""
        left, right = self.reach
        low = 0 if left < 0 else start + self.offset - left
        high = self.keys if right < 0 else stop + self.offset + right
        low = min(max(low, 0), self.keys)
        return low, max(low, min(max(high, 0), self.keys))

    def tile(self, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype) -> Tile:
        """Bias (in `dtype`) and mask of queries [rows) against keys [columns)."""
        (i0, i1), (j0, j1) = rows, columns
        band = self._band(i0, i1, j0, j1)
        if self.decay is not None:
            first = self._at_rows(self.decay.first, i0, i1)[..., None]
            recent = torch.arange(j0, j1, device=first.device) >= first
            band = recent if band is None else band & recent
        bias = self._bias(i0, i1, j0, j1, band, dtype)
        if self.key_mask is not None:
            real = self.key_mask[:, None, None, j0:j1]
            band = real if band is None else band & real
        return Tile(bias, band)

    def _cuts(self, i0: int, i1: int, j0: int, j1: int) -> tuple[bool, bool]:
        """Whether the tile sticks out, left and right, of the band that all its rows share."""
        left, right = self.reach
        return (
            left >= 0 and j0 < i1 - 1 + self.offset - left,
            right >= 0 and j1 - 1 > i0 + self.offset + right,
        )

    def _band(self, i0: int, i1: int, j0: int, j1: int) -> Tensor | None:
        """Which keys are seen by position alone, [1, 1, rows, columns]; None: all."""
        cut_left, cut_right = self._cuts(i0, i1, j0, j1)
        if not (cut_left or cut_right):
            return None
        left, right = self.reach
        position = torch.arange(i0, i1, device=self.device)[:, None] + self.offset
        key = torch.arange(j0, j1, device=self.device)
        if cut_left and cut_right:
            band = (key >= position - left) & (key <= position + right)
        else:
            band = key >= position - left if cut_left else key <= position + right
        return band[None, None]

    def _bias(
        self, i0: int, i1: int, j0: int, j1: int, seen: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        total = None
        if self.decay is not None and seen is not None:
            rows = self._at_rows(self.decay.sums, i0, i1)
            columns = self._heads(self.decay.sums[:, :, j0:j1])
            # The difference is formed in float64. Where a row does not see the key it may be
            # positive and huge, which would leak into sums as inf although masked: 0 there.
            difference = (rows[..., None] - columns[:, :, None]).to(dtype)
            total = torch.where(seen, difference, 0.0)
        if self.key_bias is not None:
            columns = self._heads(self.key_bias[:, :, j0:j1])[:, :, None].to(dtype)
            total = columns if total is None else total + columns
        if self.bias is not None:
            dense = self.bias[(None,) * (4 - self.bias.dim())].to(dtype)
            dense = dense[:, :, _cut(dense, 2, i0, i1), _cut(dense, 3, j0, j1)]
            total = dense if total is None else total + dense
        return total

    def _at_rows(self, columns: Tensor, i0: int, i1: int) -> Tensor:
        """Per-key values [B, h, S] read at the positions of queries [i0, i1)."""
        columns = self._heads(columns)
        if not self.keys:
            return columns.new_zeros(*columns.shape[:2], 1)
        if not self.causal:
            return columns[:, :, -1:]
        positions = torch.arange(i0, i1, device=columns.device) + self.offset
        return columns.index_select(2, positions.clamp(0, self.keys - 1))

    def _heads(self, operand: Tensor) -> Tensor:
        """Key heads repeated to query heads, where an operand lives on key heads."""
        if operand.shape[1] in (1, self.heads):
            return operand
        return operand.repeat_interleave(self.heads // operand.shape[1], 1)


def _cut(tensor: Tensor, axis: int, start: int, stop: int) -> slice:
    return slice(None) if tensor.shape[axis] == 1 else slice(start, stop)
