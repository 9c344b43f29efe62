"""The equations of linear attention, token by token: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalise: bool = True,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """S_t = exp(a_t) S_{t-1} + phi(k_t) v_t^T, z_t likewise, o_t = phi(q_t) S_t / phi(q_t) z_t.

    In float64, whatever the inputs are.
    """
    (B, H, T, D), (_, Hk, S, Dv), dtype = q.shape, v.shape, torch.float64
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    real = real[:, None, :, None]  # what a masked key holds is replaced before it is computed on
    keys = torch.where(real, _phi(torch.where(real, k, 0.0).to(dtype), feature_map), 0.0)
    values = torch.where(real, v, 0.0).to(dtype)
    queries = _phi(q.to(dtype), feature_map)
    factor = torch.as_tensor(1.0 if scale is None else scale, dtype=dtype, device=q.device)
    factor = 0.0 * factor + 1.0 if normalise else factor  # cancels against the sum of weights
    decay = keys.new_ones(B, Hk, S, 1)  # one for all channels of a key, or one for each
    if log_decay is not None:
        steps = log_decay if log_decay.dim() == 4 else log_decay[..., None]
        decay = torch.where(real, steps, 0.0).to(dtype).exp().expand(B, Hk, S, -1)

    if state is None:
        matrix, total = keys.new_zeros(B, Hk, D, Dv), keys.new_zeros(B, Hk, D)
    else:
        matrix = state["S"].to(dtype)
        total = state["z"].to(dtype) if normalise else keys.new_zeros(B, Hk, D)
    before = [(matrix, total)]  # before[n]: the state after n new keys
    for t in range(S):
        forget = decay[:, :, t]
        matrix = matrix * forget[..., None] + keys[:, :, t, :, None] * values[:, :, t, None, :]
        total = total * forget + keys[:, :, t]
        before.append((matrix, total))

    rows = []
    for i in range(T):
        matrix, total = before[max(0, S - T + i + 1)] if causal else before[S]
        query = queries[:, :, i].reshape(B, Hk, H // Hk, D)
        row = query @ matrix
        if normalise:
            weight = query @ total[..., None]
            row = torch.where(weight == 0, 0.0, row / torch.where(weight == 0, 1.0, weight))
        rows.append(row.reshape(B, H, Dv))
    out = torch.stack(rows, 2) if rows else queries.new_zeros(B, H, 0, Dv)
    out = (out * factor.reshape(-1, 1, 1)).to(q.dtype)
    if not return_state:
        return out
    tensors = {"S": before[S][0]} | ({"z": before[S][1]} if normalise else {})
    kept = {name: tensor.to(compute_dtype(q.dtype)) for name, tensor in tensors.items()}
    return out, FixedState("linear", (state.length if state else 0) + S, kept)


def _phi(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "identity":
        return x
    return torch.where(x > 0, x + 1.0, x.clamp(max=0.0).exp())  # 1 + elu(x)
