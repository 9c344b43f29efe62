"""The equations of pyramid sparse attention, token by token, with a dense score matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def pyramid_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    tail: str = "replicate",
) -> Tensor:
    """Every token of a pooled group stands where it was, with the group's mean key and value.

        o_t = sum_l,j softmax(scale q_t . K^l_j + b_j) V^l_j   over the tokens j of level l

    which is the same as one row of score + ln l per group. In float64.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    blocks = -(-S // block_k)
    at = torch.arange(blocks * block_k, device=q.device)
    behind = at >= S
    tokens = at.clamp(max=max(0, S - 1))
    if not S:
        return q.new_zeros(B, H, T, v.shape[3]) + 0 * q.sum()
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    k, v = (
        torch.where(real[:, None, :, None], x, 0.0).double().repeat_interleave(H // k.shape[1], 1)
        for x in (k, v)
    )
    bias = torch.zeros(B, H, S, dtype=torch.float64, device=q.device)
    if key_bias is not None:
        bias = bias + key_bias.double().repeat_interleave(H // key_bias.shape[1], 1)
    bias = torch.where(real[:, None], bias, -torch.inf)[:, :, tokens]
    factor = torch.as_tensor(D**-0.5 if scale is None else scale, dtype=torch.float64)
    queries = q.double() * factor.to(q.device).reshape(-1, 1, 1)
    position = torch.arange(T, device=q.device)[:, None] + S - T
    of_query = torch.arange(T, device=q.device) // block_q
    plan = levels.repeat_interleave(H // levels.shape[1], 1).expand(B, H, -1, -1)
    plan = plan[:, :, of_query].repeat_interleave(block_k, 3)

    scores, values = [], []
    for level in (1, 2, 4, 8):
        if block_k % level:
            continue
        counted = bias.masked_fill(behind, -torch.inf) if level == 1 or tail == "exact" else bias
        grouped = counted.unflatten(2, (-1, level))
        top = grouped.detach().amax(3, keepdim=True)
        weights = torch.exp(grouped - torch.where(top == -torch.inf, 0.0, top))
        sums = weights.sum(3, keepdim=True)
        weights = (weights / torch.where(sums == 0, 1.0, sums))[..., None]
        key, value = (
            (weights * x[:, :, tokens].unflatten(2, (-1, level))).sum(3).repeat_interleave(level, 2)
            for x in (k, v)
        )
        last = (at // level + 1) * level - 1
        last = last if level > 1 and tail == "replicate" else last.clamp(max=S - 1)
        score = queries @ key.mT + counted[:, :, None]
        hidden = (plan != level) | (counted == -torch.inf)[:, :, None]
        if causal:
            hidden = hidden | (last > position)
        scores.append(score.masked_fill(hidden, -torch.inf))
        values.append(value)
    table = torch.cat(scores, 3)
    top = table.detach().amax(3, keepdim=True)
    weights = torch.exp(table - torch.where(top == -torch.inf, 0.0, top))
    sums = weights.sum(3, keepdim=True)
    return ((weights / torch.where(sums == 0, 1.0, sums)) @ torch.cat(values, 2)).to(q.dtype)
