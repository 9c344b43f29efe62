"""Attention of tiles of queries to keys that have been gathered for them, and its gradient.

One tile is a few queries that share their keys, so that everything is a batched product. Used by
forms that gather the same number of keys for every tile.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [n, m, Dv] and log-sum-exp [n, m, 1] of q [n, m, D] (scaled), k [n, C, D], v.

    hidden: bool [n, 1, C]; a query that sees nothing gives 0 and -inf.
    """
    scores = torch.bmm(q, k.mT)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    top = scores.amax(2, keepdim=True)
    top = top.masked_fill_(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(2, keepdim=True)
    out = torch.bmm(weights, v).div_(total.masked_fill(total == 0, 1.0))
    return out, top.add_(total.log_())


def gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    The weights are computed again from the log-sum-exp. A query that no loss looks at has no
    effect, even where it has overflowed.
    """
    weights = torch.bmm(q, k.mT)
    if hidden is not None:
        weights.masked_fill_(hidden, -torch.inf)
    weights.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()
    idle = (d_out == 0).all(2, keepdim=True)
    if bool(idle.any()):
        weights.masked_fill_(idle, 0.0)
        out = torch.where(idle, 0.0, out)
    dv = torch.bmm(weights.mT, d_out)
    slopes = torch.bmm(d_out, v.mT).sub_((d_out * out).sum(2, keepdim=True)).mul_(weights)
    return torch.bmm(slopes, k), torch.bmm(slopes.mT, q), dv
