"""The equations of Hedgehog with the whole T x S matrix: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def hedgehog_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    map_q: Tensor | None = None,
    map_k: Tensor | None = None,
    bias_q: Tensor | None = None,
    bias_k: Tensor | None = None,
    activation: str = "softmax_dim",
    full_space: bool = True,
    skip: bool = False,
    epsilon: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """w_ij = phi(q_i) . phi(k_j), o_i = sum_j w_ij v_j / (sum_j w_ij + epsilon); in float64."""
    (B, H, T, _), (_, Hk, S, Dv), dtype = q.shape, v.shape, torch.float64
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    real = real[:, None, :, None]  # what a masked key holds is replaced before it is computed on
    k, v = torch.where(real, k, 0.0).to(dtype), torch.where(real, v, 0.0).to(dtype)
    heads = max([Hk, *(x.shape[0] for x in (map_k, bias_k) if x is not None)])
    k, v = (x.repeat_interleave(heads // Hk, 1) for x in (k, v))
    if epsilon is None:
        epsilon = 0.0 if activation == "exp" else 1e-12
    queries = _phi(q.to(dtype), map_q, bias_q, activation, full_space, skip)
    if activation == "exp":
        queries = queries / queries.amax(-1, keepdim=True)
    keys = _phi(k, map_k, bias_k, activation, full_space, skip)
    keys = torch.where(real, keys, 0.0)

    F = keys.shape[-1]
    matrix, total = keys.new_zeros(B, heads, F, Dv), keys.new_zeros(B, heads, F)
    if state is not None:
        matrix, total = state["S"].to(dtype), state["z"].to(dtype)
    each = lambda x: x.repeat_interleave(H // heads, 1)  # noqa: E731
    weights = queries @ each(keys).mT
    if causal:
        at = torch.arange(T, device=q.device)[:, None] + S - T
        weights = torch.where(torch.arange(S, device=q.device) <= at, weights, 0.0)
    above = weights @ each(v) + queries @ each(matrix)
    below = weights.sum(-1, keepdim=True) + queries @ each(total)[..., None] + epsilon
    out = torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below)).to(q.dtype)
    if not return_state:
        return out
    tensors = {"S": matrix + keys.mT @ v, "z": total + keys.sum(2)}
    kept = {name: tensor.to(compute_dtype(q.dtype)) for name, tensor in tensors.items()}
    return out, FixedState("hedgehog", (state.length if state else 0) + S, kept)


def _phi(
    x: Tensor, map_: Tensor | None, bias: Tensor | None, activation: str, full: bool, skip: bool
) -> Tensor:
    z = (
        x
        if map_ is None
        else torch.einsum("bhnd,hdf->bhnf", x, map_.to(x).expand(x.shape[1], -1, -1))
    )
    if bias is not None:
        z = z + bias.to(x).reshape(bias.shape[0], 1, -1)
    if skip:
        z = z + x
    if activation == "relu":
        return z.clamp(min=1e-12)
    if activation == "pos_elu":
        return torch.where(z > 0, z + 1.0, z.clamp(max=0.0).exp()).clamp(min=1e-12)
    if activation == "joint_softmax":
        return torch.cat([2 * z, -2 * z], -1).softmax(-1)
    if activation == "exp":
        half = lambda z: z.clamp(-60.0, 60.0).exp()  # noqa: E731
    elif activation == "exp_dim":
        half = lambda z: (z - z.amax(-1, keepdim=True)).exp().clamp(min=1e-12)  # noqa: E731
    else:
        half = lambda z: z.softmax(-1).clamp(min=1e-12)  # noqa: E731
    return torch.cat([half(z), half(-z)], -1) if full else half(z)
