"""Matrix products by oneDNN where that is twice as fast as torch's own: float32 under AVX-512.

torch.mm calls MKL, which on many AVX-512 machines reaches half of what oneDNN does. oneDNN is
behind a private operator; it is tried once against torch.mm, and left alone if it is missing or
wrong. The second matrix must be contiguous, or the transpose of one that is: anything else
falls to a loop a thousand times slower.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LEAST = 1 << 16  # rows x keys below which a call costs more than it saves
FEWEST_ROWS = 32


def serves(like: Tensor, dtype: torch.dtype, rows: int, keys: int) -> bool:
    """Whether products of that size on that device go to oneDNN."""
    large = rows >= FEWEST_ROWS and rows * keys >= LEAST
    if not large or dtype != torch.float32 or like.device.type != "cpu":
        return False
    # At a lower setting oneDNN would round operands to bfloat16, which no solver survives.
    return torch.get_float32_matmul_precision() == "highest" and available()


def times(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T for x [M, K] and w [N, K], plus bias [N]."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


def times_and_weigh(x: Tensor, w: Tensor, weights: Tensor) -> Tensor:
    """(x w^T) * weights in one pass."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, weights, w, None, "mul")


def times_and_add(x: Tensor, w: Tensor, other: Tensor) -> Tensor:
    """x w^T + other in one pass."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, w, None, "add")


@cache
def available() -> bool:
    """Tries the operator once."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    generator = torch.Generator().manual_seed(0)
    x, w, weights = (torch.randn(s, generator=generator) for s in ((40, 17), (64, 17), (40, 64)))
    try:
        exact = x.double() @ w.double().t()
        found = (
            (times(x, w), exact),
            (times(weights, w.t()), weights.double() @ w.double()),
            (times_and_weigh(x, w, weights), exact * weights.double()),
            (times_and_add(x, w, weights), exact + weights.double()),
            (times(x.t(), weights.t()), x.double().t() @ weights.double()),
        )
        return all(bool((a - b).norm() < 1e-5 * b.norm()) for a, b in found)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
