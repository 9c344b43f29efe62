"""Decay as a score bias: prefix sums that stay right at 64k tokens and at minus infinity.

A per-token `log_decay` (<= 0) multiplies the weight of every older key by its exponential:
query i sees key j with the extra score  sum_{l=j+1..i} log_decay_l = L_i - L_j.  The sums run
in float64 (a float32 prefix is wrong by 1e-3 at 64k tokens) and start anew at each minus
infinity, which is no number to add but a first visible key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A finite step below this forgets like -inf: beside such a sum float64 loses all small ones.
FORGETS_BELOW = -1e9


class DecaySums(NamedTuple):
    """Running sums `sums` (float64) and first visible keys `first` (int64), both [B, h, S]."""

    sums: Tensor
    first: Tensor


def decay_sums(
    log_decay: Tensor, key_mask: Tensor | None = None, previous: DecaySums | None = None
) -> DecaySums:
    """Sums of `log_decay` [B, h, S] or [B, h, S, D], where masked keys advance nothing.

    `previous` holds the sums of the keys before these (all of them, [B, h, S0]); the new ones
    continue from its last column and the result covers the new keys only.

    >>> sums, first = decay_sums(torch.tensor([[[-1.0, -2.0, -torch.inf, -3.0]]]))
    >>> sums.tolist(), first.tolist()
    ([[[-1.0, -3.0, 0.0, -3.0]]], [[[0, 0, 2, 2]]])
    """
    S, per_channel = log_decay.shape[2], log_decay.dim() == 4
    steps = log_decay.double()
    if key_mask is not None:
        real = key_mask[:, None, :, None] if per_channel else key_mask[:, None]
        steps = torch.where(real, steps, 0.0)
    past = previous.sums.shape[2] if previous is not None else 0
    forgets = steps < FORGETS_BELOW
    sums = torch.where(forgets, 0.0, steps).cumsum(2)
    positions = torch.arange(past, past + S, device=log_decay.device)
    if per_channel:
        positions = positions[:, None]
    begun = torch.where(forgets, positions, -1)  # where the segment of a key began, if in here
    if S:
        begun = begun.cummax(2).values
    here = begun >= 0
    # What had accumulated when a segment began is taken off the whole segment.
    base = torch.where(here, sums.gather(2, (begun - past).clamp(min=0)), 0.0)
    if previous is None or not past:
        return DecaySums(sums - base, begun.clamp(min=0))
    base = torch.where(here, base, -previous.sums[:, :, -1:])
    return DecaySums(sums - base, torch.where(here, begun, previous.first[:, :, -1:]))
