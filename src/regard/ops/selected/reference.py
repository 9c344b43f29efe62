"""Attention to the most important blocks, as the equations say it; float64-capable."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_topk_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    count: int,
    causal: bool = True,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """A dense mask of T x S, query by query."""
    (B, H, T, D), (Hk, S), dtype = q.shape, k.shape[1:3], q.dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    q, k, v = (x.to(wide) for x in (q, k, v))
    factor: float | Tensor = D**-0.5
    if scale is not None:
        factor = scale.to(wide).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
    q = q * factor
    real = torch.ones(B, S, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    k, v = (torch.where(real[:, None, :, None], x, 0.0) for x in (k, v))
    group = H // max(Hk, 1)
    allowed = 1 << math.ceil(math.log2(count))
    out = q.new_zeros(B, H, T, v.shape[3])
    for b in range(B):
        for i in range(max(0, T - S), T):
            tokens = real[b, : S - T + i + 1].nonzero()[:, 0]  # that query i sees
            if not len(tokens):
                continue
            complete, current = len(tokens) // block, (len(tokens) - 1) // block
            for head in range(Hk):
                heads = slice(head * group, (head + 1) * group)
                queries, keys = q[b, heads, i], k[b, head, tokens]
                chosen = {current}
                if current and allowed > 1:
                    blocks = keys[: complete * block].detach().unflatten(0, (complete, block))
                    share = (queries.detach() @ blocks.mean(1).T).softmax(1).sum(0)[:current]
                    chosen |= set(share.topk(min(allowed - 1, current)).indices.tolist())
                places = torch.arange(len(tokens), device=q.device) // block
                kept = torch.isin(places, torch.tensor(sorted(chosen), device=q.device))
                weights = (queries @ keys[kept].T).softmax(1)
                out = out.index_put(
                    (torch.tensor(b), torch.arange(H)[heads], torch.tensor(i)),
                    weights @ v[b, head, tokens[kept]],
                )
    return (out + 0.0 * (q.sum() + k.sum() + v.sum())).to(dtype)
