"""How sharp rows of attention are, and how alike two sets of them: plain functions of weights.

All take weights [B, H, T, S] (of any leading axes) and `seen`, bool and broadcast to them: the
keys that a query can see. None: where the weights (the teacher's, of two) are not 0. Means are
over rows that see at least `least_keys` keys, as short rows are alike whatever one does.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def entropy(
    weights: Float[Tensor, "*b t s"], seen: Bool[Tensor, "*b t s"] | None = None,
    least_keys: int = 8,
) -> Float[Tensor, ""]:  # fmt: skip
    """Mean entropy of the rows in nats, - sum_j p_ij log p_ij: log n is uniform over n keys.

    >>> entropy(torch.full((1, 1, 4, 16), 1 / 16)).exp().round(decimals=3)
    tensor(16.)
    """
    return _mean(-torch.special.xlogy(weights, weights).sum(-1), _seen(weights, seen), least_keys)


def kullback_leibler(
    teacher: Float[Tensor, "*b t s"],
    student: Float[Tensor, "*b t s"],
    seen: Bool[Tensor, "*b t s"] | None = None,
    least_keys: int = 1,
) -> Float[Tensor, ""]:
    """Mean over rows of sum_j a_ij log(a_ij / p_ij): 0 where the student equals the teacher.

    The student's weights are at least 1e-12 here.
    """
    logs = student.clamp(min=1e-12).log()
    rows = (torch.special.xlogy(teacher, teacher) - teacher * logs).sum(-1)
    return _mean(rows, _seen(teacher, seen), least_keys)


def monotonicity(
    logits: Float[Tensor, "*b t s"],
    weights: Float[Tensor, "*b t s"],
    seen: Bool[Tensor, "*b t s"] | None = None,
    least_keys: int = 8,
) -> Float[Tensor, ""]:
    """Mean Spearman correlation, row by row, of the teacher's logits and the student's weights.

    1 where larger products always have larger weights. The teacher's weights do for its logits.
    Rows in which either is constant do not count.

    >>> x = torch.randn(1, 1, 5, 9)
    >>> [round(float(monotonicity(x, y)), 4) for y in (x.exp(), -x)]
    [1.0, -1.0]
    """
    seen = _seen(logits, seen).expand(logits.shape)
    one, other = (_centred_ranks(x, seen) for x in (logits, weights))
    size = (one.square().sum(-1) * other.square().sum(-1)).sqrt()
    rows = (one * other).sum(-1) / size.masked_fill(size == 0, 1.0)
    counted = seen & (size > 0)[..., None]
    return _mean(rows, counted, least_keys).to(weights.dtype)


def top_agreement(
    teacher: Float[Tensor, "*b t s"],
    student: Float[Tensor, "*b t s"],
    seen: Bool[Tensor, "*b t s"] | None = None,
    least_keys: int = 8,
) -> Float[Tensor, ""]:
    """The share of rows in which both give the most weight to the same key.

    >>> top_agreement(torch.eye(8)[None, None], torch.eye(8)[None, None], least_keys=1)
    tensor(1.)
    """
    seen = _seen(teacher, seen).expand(teacher.shape)
    one, other = (x.masked_fill(~seen, -torch.inf).argmax(-1) for x in (teacher, student))
    return _mean((one == other).to(teacher.dtype), seen, least_keys)


def _seen(weights: Tensor, seen: Tensor | None) -> Tensor:
    return weights != 0 if seen is None else seen


def _mean(rows: Tensor, seen: Tensor, least_keys: int) -> Tensor:
    counted = (seen.sum(-1) >= least_keys).expand(rows.shape)
    return rows.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def _centred_ranks(x: Tensor, seen: Tensor) -> Tensor:
    """Ranks among the keys that are seen, equals sharing theirs, less their mean; 0 elsewhere."""
    x = x.detach().double().masked_fill(~seen, torch.inf).contiguous()
    ordered = x.sort(-1).values
    below = torch.searchsorted(ordered, x)
    upto = torch.searchsorted(ordered, x, right=True)
    ranks = (below + upto).double().masked_fill(~seen, 0.0) / 2
    mean = ranks.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return (ranks - mean).masked_fill(~seen, 0.0)
