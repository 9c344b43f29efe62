"""How much error is allowed: one table for the whole library."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Quantity = Literal["value", "gradient", "same"]

# Relative error in the Frobenius norm. "value" and "gradient" are against the float64 reference;
# "same" is between two orders of one computation (padded or not, decoded or parallel).
_TABLE: dict[torch.dtype, dict[Quantity, float]] = {
    torch.float64: {"value": 1e-10, "gradient": 1e-8, "same": 1e-11},
    torch.float32: {"value": 1e-5, "gradient": 1e-4, "same": 1e-5},
    torch.float16: {"value": 2e-3, "gradient": 1e-2, "same": 2e-3},
    torch.bfloat16: {"value": 1.2e-2, "gradient": 4e-2, "same": 1.2e-2},
}


def budget(dtype: torch.dtype, quantity: Quantity = "value") -> float:
    """The relative error that a result of this dtype may have."""
    return _TABLE[dtype][quantity]


ROOM = 1.5  # times what rounding the inputs does by itself


def allowed_of_half(
    dtype: torch.dtype, inputs: float, output: float, device: str = "cpu", own: float | None = None
) -> float:
    """The relative error that the output of a call with 16-bit inputs may have, by every proof.

    1.5 times what rounding the inputs does by itself (`inputs`), and rounding the output
    (`output`); where that is more, the mechanism's own budget (`own`), and of float16 off a CPU
    the budget of the library: tensor cores round weights and states as coarsely as these inputs
    were rounded.

    >>> allowed_of_half(torch.bfloat16, inputs=4e-3, output=1e-3)
    0.007
    >>> allowed_of_half(torch.float16, inputs=4e-4, output=1e-4, device="cuda")
    0.002
    """
    allowed = max(ROOM * inputs + output, own or 0.0)
    if dtype == torch.float16 and torch.device(device).type != "cpu":
        allowed = max(allowed, budget(dtype))
    return allowed


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; NaN or inf anywhere gives infinity.

    An expected zero is compared absolutely.

    >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.0
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    # On a GPU where both are there: large ones take seconds to copy. Others may lack float64.
    there = actual.device == expected.device and actual.device.type == "cuda"
    where = actual.device if there else torch.device("cpu")
    actual, expected = (x.detach().double().to(where) for x in (actual, expected))
    difference, size = float((actual - expected).norm()), float(expected.norm())
    if not (math.isfinite(difference) and math.isfinite(size)):
        return math.inf
    return difference / size if size > 0 else difference
