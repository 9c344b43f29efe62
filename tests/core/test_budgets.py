"""The table of errors, and the one measure of them."""

from __future__ import annotations

import math

import pytest
import torch

from regard.core.budgets import budget, relative_error

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_budgets_are_above_the_rounding_of_their_dtype_and_below_a_visible_error():
    for dtype in DTYPES:
        for quantity in ("value", "gradient", "same"):
            assert torch.finfo(dtype).eps < budget(dtype, quantity) < 0.05
        assert budget(dtype, "value") <= budget(dtype, "gradient")
    values = [budget(dtype) for dtype in DTYPES]
    assert values == sorted(values)


def test_relative_error_is_the_ratio_of_norms_in_float64():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(expected + torch.tensor([0.05, 0.0]), expected) == pytest.approx(0.01)
    tiny = torch.tensor([1e-30], dtype=torch.float32)
    assert relative_error(2 * tiny, tiny) == pytest.approx(1.0)
    large = torch.full((4,), 6e4, dtype=torch.float16)
    assert relative_error(large, large) == 0.0


def test_an_expected_zero_is_compared_absolutely():
    assert relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 1.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad):
    spoilt, good = torch.tensor([1.0, bad]), torch.ones(2)
    assert relative_error(spoilt, good) == math.inf
    assert relative_error(good, spoilt) == math.inf
    assert relative_error(spoilt, spoilt) == math.inf
    beyond = torch.full((2,), 1e300, dtype=torch.float64)  # its norm is not a float64
    assert relative_error(beyond, beyond * 1.5) == math.inf


def test_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match=r"shapes differ: \[1, 2\] and \[2\]"):
        relative_error(torch.ones(1, 2), torch.ones(2))


def test_gradients_and_devices_do_not_matter():
    x = torch.ones(2, requires_grad=True)
    assert relative_error(x, torch.ones(2, dtype=torch.bfloat16)) == 0.0
