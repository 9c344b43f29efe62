"""The equations of attention to blocks at several resolutions, with a dense score matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def block_sparse_reference(
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
    window: tuple[int, int] | None = None,
    tail: str = "exact",
) -> Tensor:
    """o_i = sum_r softmax_r(scale q_i . k_r + b_r) v_r over the rows r that the plan gives i.

    Level 1 has a row for every token; level l one for every l tokens, with the mean of their keys
    and of their values, weighted by exp(b_t), and b_r = log sum_t exp(b_t). In float64.
    """
    (B, H, T, D), (_, Hk, S, Dv) = q.shape, v.shape
    queries = q.double()
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    keys, values = (
        torch.where(real[:, None, :, None], x, 0.0).double().repeat_interleave(H // Hk, 1)
        for x in (k, v)
    )
    bias = torch.zeros(B, H, S, dtype=torch.float64, device=q.device)
    if key_bias is not None:
        bias = bias + key_bias.double().repeat_interleave(H // key_bias.shape[1], 1)
    bias = torch.where(real[:, None], bias, -torch.inf)
    factor = D**-0.5 if scale is None else scale
    factor = torch.as_tensor(factor, dtype=torch.float64, device=q.device).reshape(-1, 1, 1)
    position = torch.arange(T, device=q.device) + S - T
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right

    plan = levels.repeat_interleave(H // levels.shape[1], 1).expand(B, H, -1, -1)
    block_of_query = torch.arange(T, device=q.device) // block_q
    scores, rows = [], []
    for level in (1, 2, 4, 8):
        if block_k % level:
            continue
        end = -(-S // block_k) * block_k if tail == "replicate" and level > 1 else S
        for start in range(0, end, level):
            tokens = [min(t, S - 1) for t in range(start, start + level)]
            if tail == "exact" or level == 1:
                tokens = list(dict.fromkeys(tokens))
            last = start + level - 1 if tail == "replicate" else tokens[-1]
            biases = bias[:, :, tokens]
            total = biases.logsumexp(2)
            empty = (total == -torch.inf)[..., None]
            shares = torch.where(
                empty, 0.0, (biases - torch.where(empty, 0.0, total[..., None])).exp()
            )
            key = (shares[..., None] * keys[:, :, tokens]).sum(2)
            rows.append((shares[..., None] * values[:, :, tokens]).sum(2))
            score = (queries * factor) @ key[..., None]
            seen = plan[:, :, block_of_query, start // block_k] == level
            if right >= 0:
                seen = seen & (last <= position + right)
            if left >= 0:
                seen = seen & (start >= position - left)
            score = torch.where(seen & ~empty, score[..., 0], -torch.inf)
            scores.append(score + torch.where(empty[..., 0], 0.0, total)[..., None])
    if not scores:
        return q.new_zeros(B, H, T, Dv)
    table = torch.stack(scores, 3)
    top = table.detach().amax(3, keepdim=True)
    weights = torch.exp(table - torch.where(top == -torch.inf, 0.0, top))
    sums = weights.sum(3, keepdim=True)
    return ((weights / torch.where(sums == 0, 1.0, sums)) @ torch.stack(rows, 2)).to(q.dtype)
