"""Products of decays over a run of tokens, as exponentials of differences of sums.

No power of a decay is ever formed, so nothing overflows; sums run in float64 and differences
are rounded afterwards. A step of minus infinity is no number to add: it cuts the past off, as
does a step below `FORGETS`, whose exponential is 0 in float64 too (added to a sum it would
cost the digits of its neighbours).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

FORGETS = -1000.0


def split_steps(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Finite steps (float64, 0 where all is forgotten) and whether a token forgets all before."""
    forgets = log_decay < FORGETS
    return log_decay.double().masked_fill(forgets, 0.0), forgets


class Run(NamedTuple):
    """The decays inside a run of m tokens. `seen*` is where a product is not cut to exact 0.

    inside [N, m, m]: from key j to query t (0 for later keys);
    entering [N, m, 1]: from the state before the run to query t;
    leaving [N, m, 1]: from key j to the end of the run; whole [N, 1, 1]: over the run.
    """

    inside: Tensor
    entering: Tensor
    leaving: Tensor
    whole: Tensor
    seen_inside: Tensor
    seen_entering: Tensor
    seen_leaving: Tensor
    seen_whole: Tensor


def run_decays(log_decay: Tensor, earlier: Tensor, dtype: torch.dtype) -> Run:
    """All products over a run with steps `log_decay` [N, m]; `earlier` [m, m] is j <= t."""
    steps, forgets = split_steps(log_decay)
    sums, cuts = steps.cumsum(1), forgets.cumsum(1)
    seen_inside = (cuts[:, :, None] == cuts[:, None, :]) & earlier
    differences = (sums[:, :, None] - sums[:, None, :]).to(dtype)
    inside = differences.masked_fill_(~seen_inside, -torch.inf).exp_()
    return Run(
        inside,
        sums[:, :, None].to(dtype).exp(),
        (sums[:, -1:, None] - sums[:, :, None]).to(dtype).exp(),
        sums[:, -1:, None].to(dtype).exp(),
        seen_inside,
        cuts[:, :, None] == 0,
        (cuts == cuts[:, -1:])[:, :, None],
        cuts[:, -1:, None] == 0,
    )


def decays_to_end(log_decay: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over log_decay [B, h, S, c]: from each key to the end [B, h, S, c], over all [B, h, c],
    and both masks of what is not forgotten."""
    steps, forgets = split_steps(log_decay)

    def after(x: Tensor) -> Tensor:  # sums over the tokens that follow
        return pad(x[:, :, 1:], (0, 0, 0, min(1, x.shape[2]))).flip(2).cumsum(2).flip(2)

    leaving, seen = after(steps).to(dtype).exp(), after(forgets.long()) == 0
    whole, kept = steps.sum(2).to(dtype).exp(), ~forgets.any(2)
    return leaving, whole, seen, kept
