"""Attention within a mask of blocks whose weights and values are integers as well.

Block by block with a running maximum, as the kernels do it: what a weight is rounded to depends
on the maximum when its block is met. For the study of accuracy, not for speed.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from regard.ops.paro.quantise import round_away


def attend_quantised(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int, kind: str
) -> Tensor:
    """q (scaled), k, v [B, H, L, D], q and k rounded already, mask [1 | B, 1 | H, n, n] -> out.

    "int8_pv": weights trunc(127 p) with p = exp(s - running maximum); values int8 with a scale
    per head and channel. "int4": weights round(15 p / max p) and values round(7 v / max |v|) per
    block. What they are divided by is summed from the weights before rounding.
    """
    B, H, L, _ = q.shape
    out = q.new_zeros(B, H, L, v.shape[3])
    if kind == "int8_pv":
        unit = v.abs().amax(2, keepdim=True) / 127
        v = round_away(v / torch.where(unit == 0, 1.0, unit))
    else:
        unit = v.new_ones(())
    lists = mask.expand(B, H, -1, -1).tolist()
    for b, h in product(range(B), range(H)):
        for i, kept in enumerate(lists[b][h]):
            rows = slice(i * block, (i + 1) * block)
            queries = q[b, h, rows]
            top = queries.new_full((len(queries), 1), -torch.inf)
            total, sums = torch.zeros_like(top), out[b, h, rows].clone()
            for j, wanted in enumerate(kept):
                if not wanted:
                    continue
                columns = slice(j * block, (j + 1) * block)
                scores = queries @ k[b, h, columns].mT
                higher = torch.maximum(top, scores.amax(1, keepdim=True))
                weights, fade = torch.exp(scores - higher), torch.exp(top - higher)
                total = total * fade + weights.sum(1, keepdim=True)
                sums = sums * fade + _product(weights, v[b, h, columns], kind)
                top = higher
            out[b, h, rows] = sums / torch.where(total == 0, 1.0, total)
    return out * unit


def _product(weights: Tensor, values: Tensor, kind: str) -> Tensor:
    if kind == "int8_pv":
        return torch.trunc(127 * weights) @ values / 127
    largest_p, largest_v = weights.amax(), values.abs().amax()
    p = round_away(15 * weights / torch.where(largest_p == 0, 1.0, largest_p))
    w = round_away(7 * values / torch.where(largest_v == 0, 1.0, largest_v))
    return p @ w * (largest_p / 15) * (largest_v / 7)
