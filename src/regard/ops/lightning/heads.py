"""Query heads of one key head with decays of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def heads_of_decay(q: Any, k: Any, v: Any, log_decay: Any) -> tuple[Any, Any]:
    """Keys and values with a head for each decay, where there is one per query head."""
    if not isinstance(log_decay, Tensor) or log_decay.dim() != 3:
        return k, v
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        return k, v  # the checks will name the culprit
    decays, H, Hk = log_decay.shape[1], q.shape[1], k.shape[1]
    if decays == Hk or decays != H or not Hk or H % Hk or v.shape[1] != Hk:
        return k, v
    return k.repeat_interleave(H // Hk, 1), v.repeat_interleave(H // Hk, 1)
