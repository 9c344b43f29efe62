"""The equations of the gated delta rule, token by token: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def gated_delta_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    log_decay: Tensor,
    causal: bool = False,
    normalise_keys: bool = True,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """S = exp(a_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, o_t = scale S_t^T q_t.

    In float64, whatever the inputs are.
    """
    (B, H, T, D), (_, Hk, S, Dv), dtype = q.shape, v.shape, torch.float64
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    real = real[:, None, :, None]  # what a masked key holds is replaced before it is computed on
    keys, values = (torch.where(real, x, 0.0).to(dtype) for x in (k, v))
    strength = torch.where(real[..., 0], beta, 0.0).to(dtype).expand(B, Hk, S)
    decay = torch.where(real[..., 0], log_decay, 0.0).to(dtype).exp().expand(B, Hk, S)
    if normalise_keys:
        squares = keys.square().sum(-1, keepdim=True)
        keys = keys / torch.where(squares > 0, squares, 1.0).sqrt()
    factor = torch.as_tensor(D**-0.5 if scale is None else scale, dtype=dtype, device=q.device)
    queries = q.to(dtype) * factor.reshape(-1, 1, 1)

    matrix = keys.new_zeros(B, Hk, D, Dv) if state is None else state["S"].to(dtype)
    before = [matrix]  # before[n]: the state after n new keys
    for t in range(S):
        key, value = keys[:, :, t, :, None], values[:, :, t, None, :]
        matrix = decay[:, :, t, None, None] * matrix
        error = value - key.mT @ matrix
        matrix = matrix + strength[:, :, t, None, None] * key * error
        before.append(matrix)

    rows = []
    for i in range(T):
        matrix = before[max(0, S - T + i + 1)] if causal else before[S]
        rows.append((queries[:, :, i].reshape(B, Hk, H // Hk, D) @ matrix).reshape(B, H, Dv))
    out = torch.stack(rows, 2) if rows else queries.new_zeros(B, H, 0, Dv)
    out = out.to(q.dtype)
    if not return_state:
        return out
    kept = {"S": before[S].to(compute_dtype(q.dtype))}
    return out, FixedState("gated_delta", (state.length if state else 0) + S, kept)
