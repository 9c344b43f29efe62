"""The equations of attention to routed regions, with a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | Tensor | None) -> Tensor:
    """Softmax attention in float64 of q [B, H, T, D] to the keys of seen [B, H, T, S]."""
    group = q.shape[1] // k.shape[1]
    real = seen.any(2).unflatten(1, (-1, group)).any(2)[..., None]  # nothing unseen is computed on
    keys, values = (torch.where(real, x, 0.0).double().repeat_interleave(group, 1) for x in (k, v))
    factor = torch.as_tensor(q.shape[3] ** -0.5 if scale is None else scale, dtype=torch.float64)
    scores = q.double() * factor.to(q.device).reshape(-1, 1, 1) @ keys.mT
    scores = torch.where(seen, scores, -torch.inf)
    top = scores.detach().amax(3, keepdim=True) if k.shape[2] else scores.new_zeros(())
    weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top))
    sums = weights.sum(3, keepdim=True)
    return ((weights / torch.where(sums == 0, 1.0, sums)) @ values).to(q.dtype)


def routed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    hidden: Tensor | None,
    scale: float | Tensor | None,
) -> Tensor:
    """Regions [B, H, R, m, D] of queries to the regions of keys that `route` names, in float64."""
    (B, H, R, m, _), (_, _, Rk, w, _) = q.shape, k.shape
    linked = torch.zeros(B, route.shape[1], R, Rk + 1, dtype=torch.bool, device=q.device)
    linked.scatter_(3, torch.where(route < 0, Rk, route.long()).expand(B, -1, -1, -1), True)
    seen = linked[..., :Rk].expand(B, H, R, Rk)
    seen = seen.repeat_interleave(m, 2).repeat_interleave(w, 3)
    if hidden is not None:
        seen = seen & ~hidden.flatten(1)[:, None, None]
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    out = dense(q, k, v, seen, scale)
    return out.unflatten(2, (R, m))


def region_topk_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    region: int,
    topk: int,
    per_head: bool = False,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Regions of queries to the `topk` regions whose mean keys fit their mean query best."""
    (B, H, T, _), (_, Hk, S, _) = q.shape, k.shape
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    if not T or not S:
        return q.new_zeros(B, H, T, v.shape[3])
    of_query = torch.arange(T, device=q.device) // region
    of_key = torch.arange(S, device=q.device) // region
    R, Rk = -(-T // region), -(-S // region)
    spread = torch.nn.functional.one_hot(of_query, R).double()
    mean_q = torch.einsum("bhtd,tr->bhrd", q.double(), spread) / spread.sum(0)[:, None]
    chosen = torch.nn.functional.one_hot(of_key, Rk).double()
    count = real.double() @ chosen  # [B, Rk]
    keys = torch.where(real[:, None, :, None], k, 0.0).double()
    mean_k = torch.einsum("bhsd,sr->bhrd", keys, chosen) / count.clamp(min=1)[:, None, :, None]
    scores = mean_q @ mean_k.repeat_interleave(H // Hk, 1).mT
    scores = scores if per_head else scores.sum(1, keepdim=True)
    scores = torch.where(count[:, None, None] > 0, scores, -torch.inf)
    best = scores.topk(min(topk, Rk), 3)
    route = torch.where(best.values == -torch.inf, -1, best.indices)
    spare_q, spare_k = R * region - T, Rk * region - S
    grouped = pad(q, (0, 0, 0, spare_q)).unflatten(2, (R, region))
    keys, values = (pad(x, (0, 0, 0, spare_k)).unflatten(2, (Rk, region)) for x in (k, v))
    hidden = ~pad(real, (0, spare_k)).unflatten(1, (Rk, region))
    return routed_reference(grouped, keys, values, route, hidden, scale).flatten(2, 3)[:, :, :T]
