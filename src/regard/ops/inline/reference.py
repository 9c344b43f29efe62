"""The equations of injective linear attention, with explicit weights: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState

SLOPE, RATE, HIGHEST = 0.01, 0.2, 40.0  # of leaky_relu, of exp, and of exp's argument


def inline_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    feature_map: str = "identity",
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """o_i = sum_j w_ij v_j with w_ij = (s_ij - mean_j s_ij + 1) / n, s_ij = scale q_i . k_j.

    q and k stand for their features, and j runs over the n real keys that query i sees. In
    float64, whatever the inputs are. A state is n, the means of keys and values and
    S = sum_j (k_j - mean k) (v_j - mean v)^T: what the past adds to a later query follows.
    """
    (B, H, T, D), (_, Hk, S, Dv), dtype = q.shape, v.shape, torch.float64
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    hidden = ~real[:, None, :, None]  # what a masked key holds is replaced before it is used
    keys = _phi(k.masked_fill(hidden, 0.0).to(dtype), feature_map)
    values = v.masked_fill(hidden, 0.0).to(dtype)
    queries = _phi(q.to(dtype), feature_map)
    factor = torch.as_tensor(D**-0.5 if scale is None else scale, dtype=dtype, device=q.device)
    queries = (queries * factor.reshape(-1, 1, 1)).reshape(B, Hk, H // Hk, T, D)

    if state is None:
        old_n = keys.new_zeros(B)
        old_k, old_v = keys.new_zeros(B, Hk, D), keys.new_zeros(B, Hk, Dv)
        old_S = keys.new_zeros(B, Hk, D, Dv)
    else:
        old_n = state["count"].to(dtype)
        old_S, old_k, old_v = (state[name].to(dtype) for name in ("S", "k_mean", "v_mean"))

    def after(seen: Tensor) -> tuple[Tensor, ...]:
        """n and 1/n [B, 1, 1], the means and S over the past and the new keys `seen` [B, S]."""
        n = old_n + seen.sum(1)
        share = torch.where(n > 0, 1.0 / n.clamp(min=1.0), 0.0)[:, None, None]
        each = seen[:, None, :, None]
        k_mean = (old_n[:, None, None] * old_k + torch.where(each, keys, 0.0).sum(2)) * share
        v_mean = (old_n[:, None, None] * old_v + torch.where(each, values, 0.0).sum(2)) * share
        k_off = torch.where(each, keys - k_mean[:, :, None], 0.0)
        v_off = torch.where(each, values - v_mean[:, :, None], 0.0)
        shift = (old_k - k_mean)[..., None] * (old_v - v_mean)[:, :, None]
        return share, k_mean, v_mean, old_S + old_n[:, None, None, None] * shift, k_off, v_off

    places = torch.arange(S, device=q.device)
    rows = []
    for i in range(T):
        seen = real & (places <= i + S - T) if causal else real
        share, _, v_mean, past, k_off, v_off = after(seen)
        query = queries[:, :, :, i]  # [B, Hk, G, D]
        # The weight of a new key is 1/n (query . (k - mean) + 1); the past comes as its sums.
        row = query @ past + (query @ k_off.mT) @ v_off
        rows.append((v_mean[:, :, None] + share[..., None] * row).reshape(B, H, Dv))
    out = torch.stack(rows, 2) if rows else queries.new_zeros(B, H, 0, Dv)
    out = out.to(q.dtype)
    if not return_state:
        return out
    _, k_mean, v_mean, past, k_off, v_off = after(real)
    tensors = {"S": past + k_off.mT @ v_off, "k_mean": k_mean, "v_mean": v_mean}
    tensors = {name: tensor.to(compute_dtype(q.dtype)) for name, tensor in tensors.items()}
    tensors["count"] = real.sum(1) + (0 if state is None else state["count"])
    return out, FixedState("inline", (state.length if state else 0) + S, tensors)


def inline_weights_reference(
    q: Tensor,
    k: Tensor,
    *,
    feature_map: str = "identity",
    scale: float | Tensor | None = None,
) -> Tensor:
    """The weights [B, H, T, S] of a call that sees all keys; each row sums to 1."""
    D, S = q.shape[3], k.shape[2]
    keys = _phi(k.double(), feature_map).repeat_interleave(q.shape[1] // k.shape[1], 1)
    factor = torch.as_tensor(D**-0.5 if scale is None else scale, dtype=torch.float64)
    factor = factor.reshape(-1, 1, 1)
    scores = factor * _phi(q.double(), feature_map) @ keys.mT / S
    return scores - scores.mean(3, keepdim=True) + 1.0 / S


def _phi(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "relu":
        return torch.where(x > 0, x, 0.0)
    if feature_map == "leaky_relu":
        return torch.where(x > 0, x, SLOPE * x)
    if feature_map == "exp":
        return (RATE * x).clamp(max=HIGHEST).exp()
    return x
