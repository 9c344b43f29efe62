"""The equations of lightning attention, as sums over keys: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.state import FixedState


def lightning_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    log_decay: Tensor | None = None,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, FixedState]:
    """o_t = scale sum_j w_tj (q_t . k_j) v_j, w_tj the product of decays from j to t.

    The left product, a row of scores for each query. In float64, whatever the inputs are.
    """
    (B, H, T, D), (_, _, S, Dv) = q.shape, v.shape
    queries, keys, values, decays = _prepare(q, k, v, log_decay, scale, key_mask)
    heads = keys.shape[1]
    past = keys.new_zeros(B, heads, D, Dv) if state is None else state["S"].to(keys.dtype)

    rows = []
    for i in range(T):
        last = max(-1, S - T + i) if causal else S - 1  # the key at which query i stands
        weights = _before(decays[:, :, : last + 1])
        entering = decays[:, :, : last + 1].prod(2)
        scores = queries[:, :, :, i] @ keys[:, :, : last + 1].mT * weights[:, :, None]
        entered = entering[:, :, None, None] * (queries[:, :, :, i] @ past)
        rows.append(entered + scores @ values[:, :, : last + 1])
    out = torch.stack(rows, 3) if rows else queries.new_zeros(B, heads, H // heads, 0, Dv)
    out = out.reshape(B, H, T, Dv).to(q.dtype)
    if not return_state:
        return out
    after = (keys * _before(decays)[..., None]).mT @ values + decays.prod(2)[..., None, None] * past
    kept = {"S": after.to(compute_dtype(q.dtype))}
    return out, FixedState("lightning", (state.length if state else 0) + S, kept)


def bidirectional_lightning_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """o_t = scale sum_j w_tj (q_t . k_j) v_j, w_tj the product of the decays between j and t.

    In float64, whatever the inputs are.
    """
    queries, keys, values, decays = _prepare(q, k, v, log_decay, scale, key_mask)
    rows = []
    for i in range(q.shape[2]):
        after = decays[:, :, i + 1 :].cumprod(2)
        weights = torch.cat([_before(decays[:, :, : i + 1]), after], 2)
        scores = queries[:, :, :, i] @ keys.mT * weights[:, :, None]
        rows.append(scores @ values)
    shape = *q.shape[:3], v.shape[3]
    out = torch.stack(rows, 3).reshape(shape) if rows else queries.new_zeros(shape)
    return out.to(q.dtype)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [B, h, H / h, T, D], keys, values and decays [B, h, S] with the state's h heads."""
    B, H, S, dtype = q.shape[0], q.shape[1], k.shape[2], torch.float64
    steps = k.new_zeros(B, 1, S) if log_decay is None else log_decay
    heads = max(k.shape[1], steps.shape[1])
    k, v, steps = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v, steps))
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    real = real[:, None]  # what a masked key holds is replaced before it is computed on
    keys, values = (torch.where(real[..., None], x, 0.0).to(dtype) for x in (k, v))
    decays = torch.where(real, steps, 0.0).to(dtype).exp()
    factor = torch.as_tensor(1.0 if scale is None else scale, dtype=dtype, device=q.device)
    queries = (q.to(dtype) * factor.reshape(-1, 1, 1)).unflatten(1, (heads, H // heads))
    return queries, keys, values, decays


def _before(decays: Tensor) -> Tensor:
    """From each token to the last one: the product of the decays that follow it."""
    later = torch.cat([decays[:, :, 1:], torch.ones_like(decays[:, :, :1])], 2)
    return later.flip(2).cumprod(2).flip(2)
