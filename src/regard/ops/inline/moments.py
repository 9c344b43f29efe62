"""What injective linear attention sums: keys and values about their means.

With n real keys, their mean m and the mean u of their values, the output is

    o = u + (scale / n) S^T phi(q),      S = sum_j (k_j - m) (v_j - u)^T

so all that remains for the engine is a sum of products. Without `causal` there is one m, and it
is enough to centre the keys, as centred keys sum to 0. With `causal` the means run along, and

    S_j = S_{j-1} + (k_j - m_{j-1}) (v_j - u_{j-1})^T (n_j - 1) / n_j            (Welford, 1962)

is again a plain causal sum: of differences to the means *before* each key. Nothing is subtracted
from a large sum, so an offset that all keys share costs no digits, and nothing in the past of a
key depends on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.inline.means import means


class Past(NamedTuple):
    """The real keys so far: their number [B] (int64), means [B, Hk, D] and [B, Hk, E], and S."""

    count: Tensor
    k_mean: Tensor
    v_mean: Tensor
    S: Tensor


class Centred(NamedTuple):
    """Keys and values for the engine, and what a query needs beside the sum that it reads.

    k [B, Hk, S, D], v [B, Hk, S, E]; S: the state with which the engine begins, or None;
    share: what multiplies the sum, 1.0 or a tensor [B, 1, T | 1, 1];
    mean: what is added, [B, Hk, T | 1, E]; `after`: the moments after all keys but for S, which
    is the engine's times `rescale`.
    """

    k: Tensor
    v: Tensor
    S: Tensor | None
    share: float | Tensor
    mean: Tensor
    after: tuple[Tensor, Tensor, Tensor]
    rescale: float | Tensor


def centred(k: Tensor, v: Tensor, real: Tensor | None, past: Past | None) -> Centred:
    """Every query sees all keys. `real` [B, S] is the key mask; masked k and v are finite."""
    B, S = k.shape[0], k.shape[2]
    if real is None and past is None:
        n: int | Tensor = S
        count = torch.full((B,), S, dtype=torch.int64, device=k.device)
        share: float | Tensor = 1.0 / S if S else 0.0
        k_mean, v_mean = k.sum(2) * share, v.sum(2) * share
        # One pass over the keys: centred and divided by their number.
        keys = torch.add(k_mean[:, :, None] * -share, k, alpha=share)
        return Centred(keys, v, None, 1.0, v_mean[:, :, None], (count, k_mean, v_mean), n)
    new = real.sum(1) if real is not None else k.new_full((B,), S, dtype=torch.int64)
    if real is not None:
        k, v = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (k, v))
    own = _inverse(new, k.dtype)[:, None, None]
    k_mean, v_mean = k.sum(2) * own, v.sum(2) * own
    count, state = new, None
    keys = k - k_mean[:, :, None]
    if real is not None:
        keys = keys.masked_fill(~real[:, None, :, None], 0.0)
    if past is not None:  # two sets of keys, each about its own mean (Chan et al., 1979)
        count = past.count + new
        weight = (new * _inverse(count, k.dtype))[:, None, None]
        k_shift, v_shift = k_mean - past.k_mean, v_mean - past.v_mean
        between = (past.count[:, None, None] * weight * k_shift)[..., None] * v_shift[:, :, None]
        state = past.S + between
        k_mean, v_mean = past.k_mean + weight * k_shift, past.v_mean + weight * v_shift
    share = _inverse(count, k.dtype)[:, None, None, None]
    return Centred(keys, v, state, share, v_mean[:, :, None], (count, k_mean, v_mean), 1.0)


def running(k: Tensor, v: Tensor, real: Tensor | None, past: Past | None, T: int) -> Centred:
    """T queries aligned with the last keys, each of which sees those up to its own."""
    (B, Hk, S, D), E = k.shape, v.shape[3]
    hidden, counts = None, torch.arange(1, S + 1, device=k.device).expand(B, S)
    if real is not None:
        hidden, counts = ~real[:, None, :, None], real.cumsum(1)
    first = counts.new_zeros(B), k.new_zeros(B, Hk, D), v.new_zeros(B, Hk, E)
    if past is not None:  # means are summed as differences to the old ones
        first, counts = past[:3], counts + past.count[:, None]
        k, v = k - past.k_mean[:, :, None], v - past.v_mean[:, :, None]
    if hidden is not None:
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    inverse = _inverse(counts, k.dtype)[:, None, :, None]
    keys, values, v_means, k_end = means(k, v, inverse, hidden)
    if past is not None:
        v_means, k_end = v_means + past.v_mean[:, :, None], k_end + past.k_mean
    after = (counts[:, -1], k_end, v_means[:, :, -1].clone()) if S else first
    share = _at_queries(inverse, _inverse(first[0], k.dtype)[:, None, None, None], T)
    mean = _at_queries(v_means, first[2][:, :, None], T)
    return Centred(keys, values, None if past is None else past.S, share, mean, after, 1.0)


def _at_queries(after: Tensor, before: Tensor, T: int) -> Tensor:
    """Of what holds after each of S keys, what T queries at the end see.

    Those before the first key see what held `before`.
    """
    lead = T - after.shape[2]
    if lead <= 0:
        return after[:, :, -lead:] if lead else after
    return torch.cat([before.expand(-1, -1, lead, -1), after], 2)


def _inverse(count: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / count, and 0 where there is nothing."""
    return torch.where(count > 0, 1.0 / count.clamp(min=1).to(dtype), 0.0)
