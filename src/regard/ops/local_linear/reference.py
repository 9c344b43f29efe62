"""Local linear attention straight from its equations: every weight, every covariance, one solve.

For each query i, over the keys it sees, with p = softmax of the scores:

    kbar = sum_j p_j k_j                        C = sum_j p_j (k_j - kbar)(k_j - kbar)^T
    g = (C + lambda I)^-1 (kbar - q_i)          o = sum_j p_j (1 - g . (k_j - kbar)) v_j

which is the intercept of the ridge-regularised least-squares fit of v ~ b + W (k - q_i) with
weights p. Nothing here is shared with the fast forms.

What a query does not see is replaced by 0 before it is multiplied by anything, so that no key
reaches a query before it, however large it is. A query whose own system is singular to the dtype
gets g = 0, the local average.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.core.precision import compute_dtype


def local_linear_attention_reference(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    ridge: float | Tensor = 1.0,
    ridge_mode: str = "relative",
    scale: float | Tensor | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    window: tuple[int, int] | None = None,
    kernel: str = "dot",
    intercept: bool = True,
    covariance_block: int | None = None,
) -> Float[Tensor, "b h t dv"]:
    """The output of `local_linear_attention`, differentiable any number of times.

    Holds T x S weights and T x D x D covariances, and T x S x D keys for a gradient. Computes
    in float64 for float64 inputs, in float32 otherwise.
    """
    options = (causal, ridge, ridge_mode, scale, key_mask, key_bias, log_decay, window)
    return equations(q, k, v, *options, kernel, intercept, covariance_block)[0]


def equations(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    ridge: float | Tensor,
    ridge_mode: str,
    scale: float | Tensor | None,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    log_decay: Tensor | None,
    window: tuple[int, int] | None,
    kernel: str,
    intercept: bool,
    covariance_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp of the scores [B, H, T] and g [B, H, T, D]."""
    kind, dtype = q.dtype, compute_dtype(q.dtype)
    heads, T, D, S = q.shape[1], q.shape[2], q.shape[3], k.shape[2]
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], x, 0.0) for x in (k, v))
    q, k, v = q.to(dtype), _per_head(k, heads).to(dtype), _per_head(v, heads).to(dtype)

    seen, decay = _positions_seen(T, S, causal, window, q.device), None
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    if log_decay is not None and S:
        decay, remembered = _decay(log_decay, key_mask, T, S, causal)
        seen = seen & _per_head(remembered, heads)
    seen = seen.expand(q.shape[0], heads, T, S)

    bandwidth = D**-0.5 if scale is None else _column(scale, dtype)
    scores = bandwidth * torch.where(seen, q @ k.mT, 0.0)
    if kernel == "gaussian":  # -scale |q - k|^2 / 2
        squares = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
        most = torch.finfo(dtype).max
        squares = torch.where(seen, squares, 0.0).clamp(max=most)
        scores = (scores - bandwidth * squares / 2).clamp(min=-most / 2)
    if key_bias is not None:
        scores = scores + _per_head(key_bias, heads)[:, :, None, :].to(dtype)
    if decay is not None:
        scores = scores + _per_head(decay, heads).to(dtype)
    some = seen.any(-1, keepdim=True)  # a row without keys gives 0
    scores = torch.where(seen, scores, torch.where(some, -torch.inf, 0.0))
    weights = torch.where(seen, torch.softmax(scores, -1), 0.0)  # p
    lse = torch.logsumexp(scores, -1, keepdim=True)

    strength = _ridge(ridge, heads, q)
    if ridge_mode == "absolute":  # lambda added to the Gram of the weights exp(score)
        most = math.log(torch.finfo(dtype).max) - 1  # g is 0 well before exp(-lse) overflows
        strength = strength * torch.exp(-torch.where(some, lse, 0.0).clamp(min=-most))
    if not intercept:
        moments = _moments(weights, seen, k, torch.zeros_like(q))
        g = -_solve(moments, strength, torch.where(some, q, 0.0))
        out = -(weights * torch.where(seen, g @ k.mT, 0.0)) @ v
        return out.to(kind), torch.where(some, lse, -torch.inf)[..., 0], g
    kbar = weights @ k
    m = torch.where(some, kbar - q, 0.0)
    covariance = _moments(weights, seen, k, kbar)
    g = _solve(covariance, strength, m)
    if covariance_block is not None:
        g = _from_blocks(covariance, strength, m, covariance_block)
    a = g @ k.mT - (g * kbar).sum(-1, keepdim=True)
    out = (weights * torch.where(seen, 1 - a, 0.0)) @ v
    return out.to(kind), torch.where(some, lse, -torch.inf)[..., 0], g


def _moments(weights: Tensor, seen: Tensor, k: Tensor, mean: Tensor) -> Tensor:
    """sum_j p_j k_j k_j^T - mean mean^T, [B, H, T, D, D]."""
    moments = mean.new_zeros(*mean.shape, mean.shape[-1])
    if weights.numel():
        rows = []
        for p, sees in zip(weights.unbind(2), seen.unbind(2), strict=True):
            keys = torch.where(sees[..., None], k, 0.0)
            rows.append((p[..., None] * keys).mT @ keys)
        moments = torch.stack(rows, 2)
    return moments - mean[..., :, None] * mean[..., None, :]


def _solve(matrix: Tensor, strength: Tensor, right: Tensor) -> Tensor:
    """(matrix + strength I)^-1 right; 0 where that is singular, whatever the other rows are."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + strength[..., None] * identity
    found, info = torch.linalg.solve_ex(matrix.detach(), right.detach()[..., None])
    sound = (info == 0) & found.isfinite().all((-2, -1))
    matrix = torch.where(sound[..., None, None], matrix, identity)
    right = torch.where(sound[..., None], right, 0.0)
    return torch.linalg.solve_ex(matrix, right[..., None])[0][..., 0]


def _from_blocks(covariance: Tensor, strength: Tensor, m: Tensor, width: int) -> Tensor:
    """g when only diagonal blocks of sum_j p_j (k_j - q)(k_j - q)^T are kept, as published."""
    moment = covariance + m[..., :, None] * m[..., None, :]
    pieces = []
    for c in range(0, m.shape[-1], width):
        at = slice(c, c + width)
        pieces.append(_solve(moment[..., at, at], strength, m[..., at]))
    rho = torch.cat(pieces, -1)
    rest = 1 - (m * rho).sum(-1, keepdim=True)
    singular = rest == 0
    return torch.where(singular, 0.0, rho) / torch.where(singular, 1.0, rest)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Key heads (or one head for all) repeated to query heads."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _column(x: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return x.to(dtype).reshape(-1, 1, 1) if isinstance(x, Tensor) else x


def _ridge(ridge: float | Tensor, heads: int, like: Tensor) -> Tensor:
    """[..., T or 1, 1], broadcasting against [B, H, T, 1]."""
    if not isinstance(ridge, Tensor):
        return like.new_full((1, 1), float(ridge))
    if ridge.dim() < 2:
        return ridge.to(like.dtype).reshape(-1, 1, 1)
    return _per_head(ridge, heads).to(like.dtype)[..., None]


def _positions_seen(
    T: int, S: int, causal: bool, window: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """[T, S]: query i stands at key position i + S - T."""
    distance = torch.arange(T, device=device)[:, None] + (S - T) - torch.arange(S, device=device)
    left, right = window if window is not None else (-1, -1)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        seen &= distance >= 0
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    return seen


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
