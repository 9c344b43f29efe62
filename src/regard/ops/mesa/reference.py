"""The equations of MesaNet's attention, token by token: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def mesa_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    ridge: float | Tensor = 1.0,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """Hkk_t = e^{a_t} Hkk_{t-1} + b_t k_t k_t^T, Hkv likewise, o_t = Hkv_t^T (Hkk_t + R)^-1 q_t.

    In float64, whatever the inputs are. A row whose own system is singular
    to that gives 0.
    """
    (B, H, T, D), (_, Hk, S, Dv), dtype = q.shape, v.shape, torch.float64
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    real = real[:, None, :, None]  # what a masked key holds is replaced before it is computed on
    keys, values = (torch.where(real, x, 0.0).to(dtype) for x in (k, v))
    ones = keys.new_ones(B, Hk, S)
    strength = ones if beta is None else torch.where(real[..., 0], beta, 0.0).to(dtype)
    decay = ones if log_decay is None else torch.where(real[..., 0], log_decay, 0.0).to(dtype).exp()
    strength, decay = strength.expand(B, Hk, S), decay.expand(B, Hk, S)
    penalty = torch.as_tensor(ridge, dtype=dtype, device=q.device)
    penalty = penalty if penalty.dim() == 2 else penalty.reshape(-1, 1)
    penalty = torch.diag_embed(penalty.expand(H, D)).reshape(Hk, H // Hk, D, D)

    if state is None:
        kk, kv = keys.new_zeros(B, Hk, D, D), keys.new_zeros(B, Hk, D, Dv)
    else:
        kk, kv = state["Hkk"].to(dtype), state["Hkv"].to(dtype)
    before = [(kk, kv)]  # before[n]: the sums after n new keys
    for t in range(S):
        forget, weight = decay[:, :, t, None, None], strength[:, :, t, None, None]
        key = weight * keys[:, :, t, :, None]
        kk = forget * kk + key * keys[:, :, t, None, :]
        kv = forget * kv + key * values[:, :, t, None, :]
        before.append((kk, kv))

    rows = []
    for i in range(T):
        kk, kv = before[max(0, S - T + i + 1)] if causal else before[S]
        query = q[:, :, i].to(dtype).reshape(B, Hk, H // Hk, D, 1)
        probe = _solve(kk[:, :, None] + penalty, query)
        rows.append((kv[:, :, None].mT @ probe).reshape(B, H, Dv))
    out = torch.stack(rows, 2) if rows else q.new_zeros(B, H, 0, Dv)
    out = out.to(q.dtype)
    if not return_state:
        return out
    kept = {"Hkk": before[S][0], "Hkv": before[S][1]}
    kept = {name: x.to(compute_dtype(q.dtype)) for name, x in kept.items()}
    return out, FixedState("mesa", (state.length if state else 0) + S, kept)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right; 0 where that is singular or overflowed, whatever the other rows are."""
    found, info = torch.linalg.solve_ex(matrix.detach(), right.detach())
    sound = ((info == 0) & found.isfinite().all((-2, -1)))[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix, right = torch.where(sound, matrix, identity), torch.where(sound, right, 0.0)
    return torch.linalg.solve_ex(matrix, right)[0]
