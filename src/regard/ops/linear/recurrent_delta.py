"""The delta rule itself, one token at a time: for decoding, where there is one token."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.ops.linear.decays import split_steps


def recurrent_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """o_t = S_t^T q_t with S_t = S + k_t beta_t (v_t - S^T k_t)^T, S = exp(a_t) S_{t-1}.

    q [B, H, T, F], k [B, Hk, T, F], v [B, Hk, T, E], beta and log_decay [B, Hk, T] (or None),
    state [B, Hk, F, E], all of one dtype but log_decay. Returns o [B, H, T, E] and the state;
    plain autograd.
    """
    B, H, T, F = q.shape
    Hk, E = v.shape[1], v.shape[3]
    if log_decay is not None:
        steps, forgets = split_steps(log_decay)
        decays = steps.to(q.dtype).exp()
    rows = []
    for t in range(T):
        if log_decay is not None:
            kept = state * decays[:, :, t, None, None]
            state = torch.where(forgets[:, :, t, None, None], 0.0, kept)
        key, strength = k[:, :, t, :, None], beta[:, :, t, None, None]
        error = v[:, :, t, None, :] - key.mT @ state
        state = state + key * (strength * error)
        rows.append((q[:, :, t].reshape(B, Hk, H // Hk, F) @ state).reshape(B, H, 1, E))
    return torch.cat(rows, 2), state
