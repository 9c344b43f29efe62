"""In which dtype things are computed, and what autocast does to an op."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float64 for float64 inputs, float32 for all others.

    >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, q, k and v in the autocast dtype, as torch's own attention does.

    A projection under autocast yields bfloat16 where a rotary embedding next to it yields
    float32; both belong to one call. float64 is left alone, as torch does. Outside autocast
    the tensors come back as they are.
    """
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors  # the op's checks will name the culprit
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def without_autocast(like: Tensor) -> torch.autocast:
    """A context in which the op's own arithmetic keeps the precision it asked for."""
    kind = "cpu" if like.device.type == "meta" else like.device.type
    return torch.autocast(device_type=kind, enabled=False)
