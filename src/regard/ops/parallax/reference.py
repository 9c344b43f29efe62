"""Parallax straight from its equation: all weights, all averages, in one piece.

For each query i, over the keys it sees, with p = softmax of the scores:

    kbar = sum_j p_j k_j        o = sum_j p_j (1 - r_i . (k_j - kbar)) v_j

What a query does not see is replaced by 0 before it is multiplied by anything, so that no key
reaches a query before it, however large it is.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.core.precision import compute_dtype


def parallax_attention_reference(
    q: Float[Tensor, "b h t d"],
    r: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    window: tuple[int, int] | None = None,
) -> Float[Tensor, "b h t dv"]:
    """The output of `parallax_attention`, differentiable any number of times.

    Holds T x S weights. Computes in float64 for float64 inputs, in float32 otherwise.
    """
    kind, dtype = q.dtype, compute_dtype(q.dtype)
    heads, T, D, S = q.shape[1], q.shape[2], q.shape[3], k.shape[2]
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], x, 0.0) for x in (k, v))
    k, v = (_per_head(x, heads).to(dtype) for x in (k, v))
    q, r = q.to(dtype), r.to(dtype)

    bandwidth = scale.to(dtype).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
    position = torch.arange(T, device=q.device)[:, None] + (S - T)
    distance = position - torch.arange(S, device=q.device)
    left, right = window if window is not None else (-1, -1)
    seen, decay = torch.ones(T, S, dtype=torch.bool, device=q.device), None
    if causal:
        seen &= distance >= 0
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    if log_decay is not None and S:
        decay, remembered = _decay(log_decay, key_mask, T, S, causal)
        seen = seen & _per_head(remembered, heads)

    products = torch.where(seen, q @ k.mT, 0.0)
    scores = products * (D**-0.5 if bandwidth is None else bandwidth)
    if key_bias is not None:
        scores = scores + _per_head(key_bias, heads)[:, :, None, :].to(dtype)
    if decay is not None:
        scores = scores + _per_head(decay, heads).to(dtype)
    some = seen.any(-1, keepdim=True)  # a row without keys gives 0
    scores = torch.where(seen, scores, torch.where(some, -torch.inf, 0.0))
    p = torch.where(some, torch.softmax(scores, -1), 0.0)  # 0 at the keys that are not seen

    kbar = p @ k
    a = r @ k.mT - (r * kbar).sum(-1, keepdim=True)
    return ((p * torch.where(seen, 1 - a, 0.0)) @ v).to(kind)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Key heads (or one head for all) repeated to query heads."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _decay(
    log_decay: Tensor, key_mask: Tensor | None, T: int, S: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """The score bias sum_{l=j+1..i} log_decay_l, and whether no -inf lies between j and i."""
    steps = log_decay.double()
    if key_mask is not None:
        steps = torch.where(key_mask[:, None], steps, 0.0)
    resets = steps == -torch.inf
    total, count = torch.where(resets, 0.0, steps).cumsum(2), resets.cumsum(2)
    at = torch.arange(T, device=steps.device) + (S - T)
    at = (at if causal else torch.full_like(at, S - 1)).clamp(min=0)
    bias = total[:, :, at, None] - total[:, :, None, :]
    remembered = count[:, :, at, None] == count[:, :, None, :]
    return torch.where(remembered & (bias <= 0), bias, 0.0), remembered
