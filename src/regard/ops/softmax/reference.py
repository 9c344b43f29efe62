"""Softmax attention as its equations say, with the whole T x S matrix: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype


def softmax_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    bias: Tensor | None = None,
    log_decay: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: tuple[int, int] | None = None,
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The output of `softmax_attention`, whose docstring has the equations and the arguments.

    With `return_aux`, (out, lse).
    """
    H, T, S, D = q.shape[1], q.shape[2], k.shape[2], q.shape[3]
    given, dtype = q.dtype, compute_dtype(q.dtype)
    if key_mask is not None:  # what a masked key contains is never looked at
        real = key_mask[:, None, :, None]
        k, v = torch.where(real, k, 0.0), torch.where(real, v, 0.0)
    q, k, v = q.to(dtype), _per_head(k, H).to(dtype), _per_head(v, H).to(dtype)

    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(-1, 1, 1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + _per_head(key_bias, H)[:, :, None].to(dtype)
    if bias is not None:
        scores = scores + bias.to(dtype)

    key = torch.arange(S, device=q.device)
    position = torch.arange(T, device=q.device)[:, None] + S - T
    if log_decay is not None:
        if key_mask is not None:
            log_decay = torch.where(key_mask[:, None], log_decay, 0.0)
        at = position if causal else torch.full_like(position, S - 1)
        scores = scores + _decay(_per_head(log_decay, H), at).to(dtype)

    seen = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        left, right = window
        seen = seen & (key >= position - left) if left >= 0 else seen
        seen = seen & (key <= position + right) if right >= 0 else seen
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = torch.where(seen, scores, -torch.inf)

    empty = ~(scores > -torch.inf).any(-1, keepdim=True)
    lse = torch.logsumexp(torch.where(empty, 0.0, scores), -1, keepdim=True)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(dtype)[:, None, None])
    weights = torch.exp(scores - total)
    out = (weights @ v).to(given)
    return (out, torch.where(empty, -torch.inf, lse).squeeze(-1)) if return_aux else out


def _decay(log_decay: Tensor, at: Tensor) -> Tensor:
    """sum_{l=j+1..at_i} log_decay_l for every (i, j), in float64: [B, H, T, S]."""
    S = log_decay.shape[2]
    key = torch.arange(S, device=log_decay.device)
    counted = torch.where(key <= at, log_decay.double()[:, :, None], 0.0)  # [B, H, T, S], by l
    until_j = counted.flip(3).cumsum(3).flip(3)  # sum over l >= j
    return torch.nn.functional.pad(until_j[..., 1:], (0, 1))[..., :S]  # sum over l >= j + 1


def _per_head(operand: Tensor, heads: int) -> Tensor:
    """[B, h, ...] with h = 1, Hk or H, repeated to H heads."""
    return operand.repeat_interleave(heads // operand.shape[1], 1)
