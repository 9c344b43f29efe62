"""Hierarchical sparse attention as the equations say it, block by block; float64-capable."""

from __future__ import annotations

import torch
from torch import Tensor


def hierarchical_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 128,
    budget: int = 1024,
    chunk: int = 64,
    boundaries: Tensor | None = None,
    local: int | None = None,
    global_: int = 0,
    window: tuple[int, int] | None = None,
    instruction: int = 0,
    normalise: bool = True,
    pooling: str = "mean",
    per_head: bool = False,
    causal: bool = False,
    scale: float | Tensor | None = None,
) -> Tensor:
    """A dense mask of T x S."""
    (B, H, T, D), (Hk, S), dtype = q.shape, k.shape[1:3], q.dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    group = H // max(Hk, 1)
    q, k, v = (
        x.to(wide) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    if boundaries is None:
        boundaries = torch.tensor([[*range(0, S, chunk), S]])
    local = block if local is None else local
    left = None if window is None or window[0] < 0 else window[0]
    reach = None if left is None else left + block  # of all queries of a block
    sees = torch.zeros(B, H, T, S, dtype=torch.bool, device=q.device)
    position = torch.arange(T, device=q.device) + S - T
    blocked = max(T - instruction, 0)
    for b in range(B if S else 0):
        for h in range(H if per_head else 1):
            heads = slice(h, h + 1) if per_head else slice(0, H)
            queries, keys = q[b, heads].detach().mean(0), k[b, heads].detach().mean(0)
            bounds = boundaries[b if len(boundaries) > 1 else 0].tolist()
            chunks = [range(x, y) for x, y in zip(bounds[:-1], bounds[1:], strict=True) if x < y]  # noqa: RUF007
            for i in range(-(-blocked // block)):
                rows = queries[i * block : min((i + 1) * block, blocked)]
                mean = rows.amax(0) if pooling == "max" else rows.sum(0)
                score: dict[int, float] = {}
                for tokens in chunks:
                    power = 0.5 if normalise else 1.0
                    common = mean @ keys[tokens.start : tokens.stop].sum(0)
                    score |= dict.fromkeys(tokens, float(common / len(tokens) ** power))
                far = (i + 1) * block + S - T
                end = min(max(far, 0), S) if causal else S
                start = 0 if reach is None else min(max(0, far - reach), end)
                most = min(budget, S) if reach is None else min(budget, reach, S)
                allowed = list(range(start, end))
                near = min(local, most, len(allowed))
                taken = allowed[len(allowed) - near :]
                others = sorted(allowed[: len(allowed) - near], key=lambda t: (score[t], t))
                taken = sorted(taken + others[::-1][: most - near])
                if global_:
                    count = min(global_, most)
                    early = [min(start + g, end - 1) for g in range(count)] if end else []
                    taken = sorted({*early, *taken[count:]})
                for token in taken:
                    sees[b, heads, i * block : min((i + 1) * block, blocked), token] = True
    sees[:, :, blocked:] = True
    place = torch.arange(S, device=q.device)
    if causal:
        sees &= place <= position[:, None]
    if left is not None:
        sees &= place >= position[:, None] - left
    factor: float | Tensor = D**-0.5
    if scale is not None:
        factor = scale.to(wide).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
    scores = (q * factor) @ k.mT
    weights = scores.masked_fill(~sees, -torch.inf).softmax(3)
    weights = torch.where(sees.any(3, keepdim=True), weights, 0.0)
    return (weights @ v).to(dtype)
