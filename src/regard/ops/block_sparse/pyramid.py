"""Keys and values at several resolutions, laid end to end as rows that a query may attend to.

Level 1 is every token by itself; a row of level l stands for the l tokens [r l, (r + 1) l). It
holds the mean of their keys and of their values and counts as all of them: its score gets

    b_r = log sum_t exp(b_t)        (ln l without key biases)

and the means are weighted by exp(b_t - b_r), so that a group of equal keys weighs what its tokens
weigh one by one. A masked key has b = -inf. What lies behind the last key is either nothing
(`tail="exact"`) or the last token again (`"replicate"`, as the released kernels count it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POOLED = (2, 4, 8)
TAILS = ("exact", "replicate")


class Layout(NamedTuple):
    """Where the rows of S tokens in blocks of `block` are: host integers, no tensors."""

    S: int
    block: int
    replicate: bool = False

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels whose groups fill a block."""
        return 1, *(level for level in POOLED if self.block % level == 0)

    @property
    def blocks(self) -> int:
        """Blocks of keys, the last of which may be shorter."""
        return -(-self.S // self.block)

    def count(self, level: int) -> int:
        """Rows of a level."""
        if level > 1 and self.replicate:
            return self.blocks * self.block // level
        return -(-self.S // level)

    def start(self, level: int) -> int:
        """The first row of a level."""
        return sum(self.count(finer) for finer in self.levels if finer < level)

    @property
    def rows(self) -> int:
        """Rows of all levels."""
        return sum(map(self.count, self.levels))

    def tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first and the last token of every row [rows]; replicas lie behind the last key."""
        if len(self.levels) == 1:  # rows are tokens
            token = torch.arange(self.S, device=device)
            return token, token
        first, last = [], []
        for level in self.levels:
            start = torch.arange(self.count(level), device=device) * level
            stop = start + level - 1
            first.append(start)
            last.append(stop if self.replicate else stop.clamp(max=self.S - 1))
        return torch.cat(first), torch.cat(last)


class Rows(NamedTuple):
    """k [B, Hk, R, D], v [B, Hk, R, Dv] and b [B, 1 | Hk, R], or None where all b are 0."""

    k: Tensor
    v: Tensor
    bias: Tensor | None


def pyramid(
    k: Tensor, v: Tensor, layout: Layout, key_mask: Tensor | None, key_bias: Tensor | None
) -> Rows:
    """The rows of all levels, differentiable in k, v and key_bias."""
    bias = None if key_bias is None else key_bias.to(k.dtype)
    if key_mask is not None:
        real = key_mask[:, None]
        k, v = (torch.where(real[..., None], x, 0.0) for x in (k, v))
        zero = k.new_zeros(()) if bias is None else bias
        bias = torch.where(real, zero, -torch.inf)
    if len(layout.levels) == 1:
        return Rows(k, v, bias)
    if bias is None:
        bias = k.new_zeros(k.shape[0], 1, layout.S)
    keys, values, biases = [k], [v], [bias]
    for level in layout.levels[1:]:
        missing = layout.count(level) * level - layout.S
        groups = [_grouped(x, level, missing, layout.replicate) for x in (k, v, bias[..., None])]
        total, shares = _shares(groups[2].squeeze(-1), missing, layout)
        keys.append((groups[0] * shares).sum(3))
        values.append((groups[1] * shares).sum(3))
        biases.append(total)
    return Rows(torch.cat(keys, 2), torch.cat(values, 2), torch.cat(biases, 2))


def _grouped(x: Tensor, level: int, missing: int, replicate: bool) -> Tensor:
    """x [B, h, S, X] as [B, h, groups, level, X], with what is missing behind it."""
    if missing:
        last = x[:, :, -1:] if replicate else torch.zeros_like(x[:, :, -1:])
        x = torch.cat([x, last.expand(-1, -1, missing, -1)], 2)
    return x.unflatten(2, (-1, level))


def _shares(bias: Tensor, missing: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """b of every group and the shares of its tokens, from their biases [B, h, groups, level]."""
    if missing and not layout.replicate:
        there = bias.new_ones(bias.shape[2:], dtype=torch.bool)
        there.view(-1)[-missing:] = False
        bias = torch.where(there, bias, -torch.inf)
    top = bias.detach().amax(3, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(bias - top)
    sums = weights.sum(3, keepdim=True)
    empty = sums == 0
    total = torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, sums).log())
    return total.squeeze(3), (weights / torch.where(empty, 1.0, sums))[..., None]
