"""Compute dtypes and autocast."""

from __future__ import annotations

import pytest
import torch

from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast


def test_sums_are_at_least_float32():
    assert compute_dtype(torch.float64) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert compute_dtype(dtype) == torch.float32


def test_outside_autocast_tensors_come_back_as_they_are():
    given = (torch.zeros(1), torch.zeros(1).half(), torch.zeros(1, device="meta"))
    assert all(a is b for a, b in zip(cast_for_autocast(*given), given, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_one_dtype_for_all_but_float64_and_integers(dtype):
    given = [torch.ones(1, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    with torch.autocast("cpu", dtype=dtype):
        cast = cast_for_autocast(*given, torch.ones(1).long())
    assert [t.dtype for t in cast] == [dtype, dtype, torch.float64, torch.int64]


def test_casting_keeps_the_gradient_and_leaves_bad_arguments_to_the_checks():
    x = torch.ones(1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (cast,) = cast_for_autocast(x)
        assert cast_for_autocast(x, None) == (x, None)
    cast.sum().backward()
    assert x.grad.item() == 1.0


def test_without_autocast_products_keep_their_precision():
    x = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
        with without_autocast(x.to("meta")):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_both_hold_under_compile():
    def product(x):
        (x,) = cast_for_autocast(x)
        with without_autocast(x):
            return x.float() @ x.float()

    compiled, x = torch.compile(product, fullgraph=True, backend="eager"), torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), product(x))
        assert compiled(x).dtype == torch.float32
