"""How coarsely keys may be pooled: blocks whose neighbours differ stay fine."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype


def similarity_caps(k: Tensor, block_k: int, thresholds: tuple[float, float, float]) -> Tensor:
    """The coarsest level that the keys of each block bear, int8 [B, Hk, nk] in {1, 2, 4, 8}.

    Level l is allowed if the mean of cos(k_{l i}, k_{l i + l - 1}), the first and the last key
    of a group, exceeds its threshold, for l = 2, 4, 8. Behind the last key it is repeated.
    """
    blocks = -(-k.shape[2] // block_k)
    keys = k.to(compute_dtype(k.dtype))
    last = keys[:, :, -1:].expand(-1, -1, blocks * block_k - k.shape[2], -1)
    keys = torch.cat([keys, last], 2).unflatten(2, (blocks, block_k))
    caps = torch.ones(keys.shape[:3], dtype=torch.int8, device=k.device)
    for level, threshold in zip((2, 4, 8), thresholds, strict=True):
        if block_k % level:
            continue
        first, final = keys[:, :, :, ::level], keys[:, :, :, level - 1 :: level]
        norms = first.norm(dim=4) * final.norm(dim=4)
        cosine = (first * final).sum(4) / (norms + 1e-6)
        caps.masked_fill_(cosine.mean(3) > threshold, level)
    return caps
