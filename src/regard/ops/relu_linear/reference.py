"""The equations of clamped ReLU linear attention, query by query: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def relu_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    temperature: float | Tensor | None = None,
    minimum: float = 100.0,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """o_i = t sum_j w_ij v_j / max(sum_j w_ij, minimum) with w_ij = relu(q_i) . relu(k_j).

    In float64, whatever the inputs are. 0 where the sum and `minimum` are 0.
    """
    (B, H, T, D), (_, Hk, S, Dv), dtype = q.shape, v.shape, torch.float64
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    hidden = ~real[:, None, :, None]  # what a masked key holds is replaced before it is used
    keys = k.masked_fill(hidden, 0.0).to(dtype).relu()
    values = v.masked_fill(hidden, 0.0).to(dtype)
    queries = q.to(dtype).relu().reshape(B, Hk, H // Hk, T, D)
    gain = D**-0.5 if temperature is None else temperature
    gain = torch.as_tensor(gain, dtype=dtype, device=q.device)

    if state is None:
        past, total = keys.new_zeros(B, Hk, D, Dv), keys.new_zeros(B, Hk, D)
    else:
        past, total = state["S"].to(dtype), state["z"].to(dtype)
    rows = []
    for i in range(T):
        seen = max(0, i + 1 + S - T) if causal else S
        query = queries[:, :, :, i]  # [B, Hk, G, D]
        weights = query @ keys[:, :, :seen].mT
        above = query @ past + weights @ values[:, :, :seen]
        below = query @ total[..., None] + weights.sum(-1, keepdim=True)
        below = torch.where(below > minimum, below, minimum)
        row = torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))
        rows.append(row.reshape(B, H, Dv))
    out = torch.stack(rows, 2) if rows else queries.new_zeros(B, H, 0, Dv)
    out = (out * gain.reshape(-1, 1, 1)).to(q.dtype)
    if not return_state:
        return out
    tensors = {"S": past + keys.mT @ values, "z": total + keys.sum(2)}
    kept = {name: tensor.to(compute_dtype(q.dtype)) for name, tensor in tensors.items()}
    return out, FixedState("relu_linear", (state.length if state else 0) + S, kept)
