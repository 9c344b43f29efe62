"""Hedgehog with a softmax window as its equations say, with the whole T x S matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def hedgehog_window_reference(
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
    window_length: int = 64,
    layout: str = "sliding",
    align: str = "start",
    gamma: float | Tensor = 0.1,
    affine: bool = False,
    scale: float | Tensor | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """p_ij ~ gamma exp(s_ij - max s_i) in the window, beta phi(q_i) . phi(k_j) behind; float64."""
    (B, H, T, D), (_, Hk, S, Dv), dtype = q.shape, v.shape, torch.float64
    length = window_length if layout == "sliding" else 2 * window_length
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    seen = real[:, None, :, None]  # what a masked key holds is replaced before it is computed on
    k, v = torch.where(seen, k, 0.0).to(dtype), torch.where(seen, v, 0.0).to(dtype)
    heads = max([Hk, *(x.shape[0] for x in (map_k, bias_k) if x is not None)])
    count = torch.zeros(B, 1, dtype=torch.int64, device=q.device)  # real tokens before these keys
    if state is not None:  # its keys come before the new ones, what is older is in S and z
        k = torch.cat([state["k"].to(dtype), k], 2)
        v = torch.cat([state["v"].to(dtype), v], 2)
        kept = torch.arange(length, device=q.device) >= length - state["count"][:, None]
        real, count = (
            torch.cat([kept, real], 1),
            state["count"][:, None] - kept.sum(1, keepdim=True),
        )
    S = real.shape[1]

    # A masked token takes no place: keys and queries are numbered by the real tokens up to them.
    number = count + real.cumsum(1) - 1
    place = torch.arange(T, device=q.device) + S - T
    at = torch.cat([count - 1, number], 1).gather(1, place.clamp(min=-1).expand(B, T) + 1)
    reach = torch.full_like(at, window_length)
    if layout == "terraced":
        blocks = at + (-S) % window_length if align == "end" else at
        reach = window_length + 1 + blocks % window_length
    visible = (torch.arange(S, device=q.device) <= place[:, None]) & real[:, None, :]
    near = number[:, None, :] > (at - reach)[..., None]
    window, behind = ((visible & x)[:, None] for x in (near, ~near))

    each = lambda x: x.repeat_interleave(H // x.shape[1], 1)  # noqa: E731
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(-1, 1, 1)
    scores = (q.to(dtype) @ each(k).mT) * (D**-0.5 if scale is None else scale)
    scores = torch.where(window, scores, -torch.inf)
    some = window.any(-1, keepdim=True)
    if S:
        most = torch.where(some, scores.amax(-1, keepdim=True), 0.0)
        scores = scores - most
    gamma = torch.as_tensor(gamma, dtype=dtype, device=q.device).reshape(-1, 1, 1)
    beta = 1 - gamma if affine else 1.0

    options = (activation, full_space, skip)
    repeated = k.repeat_interleave(heads // Hk, 1)
    values = v.repeat_interleave(heads // Hk, 1)
    queries = _phi(q.to(dtype), map_q, bias_q, *options)
    keys = torch.where(real[:, None, :, None], _phi(repeated, map_k, bias_k, *options), 0.0)
    far = torch.where(behind, queries @ each(keys).mT, 0.0)
    F = keys.shape[-1]
    matrix, total = keys.new_zeros(B, heads, F, Dv), keys.new_zeros(B, heads, F)
    if state is not None:
        matrix, total = state["S"].to(dtype), state["z"].to(dtype)
    weights = gamma * scores.exp() + beta * far
    above = weights @ each(v) + beta * (queries @ each(matrix))
    below = weights.sum(-1, keepdim=True) + beta * (queries @ each(total)[..., None])
    out = torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below)).to(q.dtype)
    if not return_state:
        return out

    latest = number > number[:, -1:] - length if S else real
    older = (real & ~latest)[:, None, :, None]
    kept = {
        "S": matrix + torch.where(older, keys, 0.0).mT @ values,
        "z": total + torch.where(older, keys, 0.0).sum(2),
    }
    slot = (real & latest)[:, :, None] & (
        number[:, :, None] - number[:, -1:, None] + length - 1
        == torch.arange(length, device=q.device)
    )  # [B, key, place in the state]
    kept |= {name: slot[:, None].to(dtype).mT @ x for name, x in (("k", k), ("v", v))}
    kept = {name: tensor.to(compute_dtype(q.dtype)) for name, tensor in kept.items()}
    kept["count"] = count[:, 0] + real.sum(1)
    return out, FixedState(
        "hedgehog_window",
        (state.length if state else 0) + v.shape[2] - (length if state else 0),
        kept,
    )


def _phi(
    x: Tensor, map_: Tensor | None, bias: Tensor | None, activation: str, full: bool, skip: bool
) -> Tensor:
    z = x if map_ is None else x @ map_.to(x)
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
    if activation == "exp_dim":
        half = lambda z: (z - z.amax(-1, keepdim=True)).exp().clamp(min=1e-12)  # noqa: E731
    else:
        half = lambda z: z.softmax(-1).clamp(min=1e-12)  # noqa: E731
    return torch.cat([half(z), half(-z)], -1) if full else half(z)
