"""The direct solve of small heads in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu.interpreter import interpreted
from ops.test_local_linear_triton_decode import EXACT, expected, make
from regard.core.budgets import budget, relative_error

pytestmark = pytest.mark.requires("triton")

CASES: dict[str, dict[str, Any]] = {
    "causal": {"T": 40, "S": 40},
    "odd sizes": {"T": 37, "S": 70, "D": 11, "Dv": 20, "Hk": 2},
    "window": {"T": 40, "S": 40, "window": (9, -1)},
    "everything": {"T": 40, "S": 40, "bias": 2, "decay": 1, "mask": True},
    "noncausal": {"T": 33, "causal": False, "decay": 2},
    "no intercept": {"T": 40, "S": 40, "intercept": False},
    "more queries than keys": {"T": 12, "S": 7},
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_float64(name: str) -> None:
    inputs = make(B=1, **CASES[name])
    out, slope, lse, iterations, residual = interpreted(
        "regard.ops.local_linear.triton.launch:forward", inputs, EXACT
    )[:5]
    whole = expected(inputs)
    assert relative_error(out, whole.out) <= budget(torch.float32)
    assert relative_error(slope, whole.slope) <= budget(torch.float32)
    assert relative_error(lse.exp(), whole.lse.exp()) <= budget(torch.float32)
    assert iterations.max() <= 40
    assert residual.max() <= 1e-5
