"""The recurrence itself, one token at a time: for decoding, where there is one token."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.ops.linear.decays import split_steps


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t with S_t = exp(a_t) S_{t-1} + k_t v_t^T, on features; plain autograd.

    q [B, H, T, F], k [B, Hk, T, F], v [B, Hk, T, E], log_decay [B, Hk, T] or [B, Hk, T, F] or
    None, state [B, Hk, F, E], all of one dtype but log_decay. Returns o [B, H, T, E] and the
    state.
    """
    B, H, T, F = q.shape
    Hk, E = v.shape[1], v.shape[3]
    if log_decay is not None:
        steps, forgets = split_steps(log_decay if log_decay.dim() == 4 else log_decay[..., None])
        decays = steps.to(q.dtype).exp()
    rows = []
    for t in range(T):
        if log_decay is not None:
            kept = state * decays[:, :, t, :, None]
            state = torch.where(forgets[:, :, t, :, None], 0.0, kept)
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t].reshape(B, Hk, H // Hk, F) @ state).reshape(B, H, 1, E))
    return torch.cat(rows, 2), state
