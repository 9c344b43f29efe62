"""Kernels run in the interpreter's process, and what goes wrong there is told here."""

from __future__ import annotations

import pytest
import torch

from gpu.interpreter import interpreted
from regard.core.budgets import budget, relative_error

pytestmark = pytest.mark.requires("triton")


def test_a_kernel_computes() -> None:
    x, y = torch.randn(64, 16) / 4, torch.randn(128, 16)
    out = interpreted("gpu.toy:products", x, y)
    expected = torch.exp2(x.double() @ y.double().mT) @ y.double()
    assert relative_error(out, expected) <= budget(torch.float32)


def test_errors_come_back() -> None:
    with pytest.raises(ZeroDivisionError, match="by zero") as found:
        interpreted("operator:floordiv", 1, 0)
    assert "interpreter's process" in found.value.__notes__[0]


def test_fresh_memory_is_not_a_number() -> None:
    assert interpreted("torch:empty", 3).isnan().all()


def test_bfloat16_is_refused_there_and_float32_is_not() -> None:
    here = torch.device("cpu")
    reason = interpreted("regard.gpu:refusal", here, torch.bfloat16)
    assert "bfloat16 products wrong" in reason
    assert interpreted("regard.gpu:refusal", here, torch.float32) is None
    assert "not float64" in interpreted("regard.gpu:refusal", here, torch.float64)
    assert "for a CPU" in interpreted("regard.gpu:refusal", torch.device("cuda"), torch.float32)
