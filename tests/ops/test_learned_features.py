"""The activations of learned feature maps and their gradients, in torch and in C."""

from __future__ import annotations

import pytest
import torch

from regard.core.budgets import relative_error
from regard.native import instruction_sets, limited_to
from regard.ops.linear import learned_features
from regard.ops.linear.learned_features import ACTIVATIONS, TWO_SIDED, activate, learned, width
from regard.ops.linear.native import activate as native
from regard.ops.linear.problem import Problem

ISAS = instruction_sets()
in_c = pytest.mark.skipif(not ISAS, reason="no native library here")
CASES = [
    *((name, True, False) for name in ACTIVATIONS),
    *((name, False, False) for name in TWO_SIDED),
    ("exp", True, True),
    ("exp", False, True),
]


@pytest.mark.parametrize(("activation", "full", "shifted"), CASES)
def test_gradients_by_finite_differences(activation, full, shifted):
    z = 2 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z.requires_grad_()
    assert activate(z, activation, full, shifted=shifted).shape[-1] == width(activation, 5, full)
    assert torch.autograd.gradcheck(lambda z: activate(z, activation, full, shifted=shifted), z)


@pytest.mark.parametrize(("activation", "full", "shifted"), CASES)
def test_the_operator_holds_what_torch_asks(activation, full, shifted):
    z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    arguments = (z, activation, full, shifted)
    torch.library.opcheck(torch.ops.regard.linear_activation_fwd.default, arguments)
    mapped = torch.func.vmap(lambda z: activate(z, activation, full, shifted=shifted))(z)
    torch.testing.assert_close(mapped, activate(z, activation, full, shifted=shifted))


def test_nothing_overflows_and_clamped_values_have_no_gradient():
    z = torch.tensor([[1e30, -1e30, 0.0], [80.0, -80.0, 3.0]], requires_grad=True)
    for activation, full, shifted in CASES:
        phi = activate(z, activation, full, shifted=shifted)
        assert phi.isfinite().all(), activation
        (gradient,) = torch.autograd.grad(phi.sum(), z)
        assert gradient.isfinite().all(), activation
        if activation == "softmax_dim":
            assert phi.min() >= 1e-12 * 0.999
            assert gradient[0].abs().max() < 1e-11


def test_shifted_exponentials_differ_by_one_factor_per_row():
    z = torch.randn(4, 6, dtype=torch.float64)
    plain, shifted = activate(z, "exp"), activate(z, "exp", shifted=True)
    ratio = plain / shifted
    assert torch.allclose(ratio, ratio[:, :1])
    assert torch.equal(shifted.amax(-1), torch.ones(4).double())


@in_c
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [1, 3, 16, 33, 64])
def test_the_c_kernel(isa, channels):
    make = torch.Generator().manual_seed(channels)
    z = 8 * torch.randn(5, 7, channels, generator=make)
    z[0, 0], z[0, 1, 0] = 0.0, 70.0
    with limited_to(isa):
        for activation, full, shifted in CASES:
            if activation not in native.KINDS:
                continue
            one, other = z.clone().requires_grad_(), z.double().requires_grad_()
            phi = torch.ops.regard.linear_activation_native_fwd(one, activation, full, shifted)
            expected = activate(other, activation, full, shifted=shifted)
            assert relative_error(phi, expected) < 3e-6, activation
            weight = torch.randn(expected.shape, generator=make, dtype=torch.float64)
            phi.backward(weight.float())
            expected.backward(weight)
            size = max(1e-6, float((weight * expected).detach().norm()))
            error = float((one.grad.double() - other.grad).norm())
            assert error < 1e-5 * size, activation
        spoilt = z.clone()
        spoilt[2, 3, 0] = torch.nan
        for activation in native.KINDS:
            phi = torch.ops.regard.linear_activation_native_fwd(spoilt, activation, True, False)
            assert phi[2, 3].isnan().any(), activation
            rest = phi.isfinite().all(-1)
            assert rest.sum() == rest.numel() - 1, activation


@in_c
def test_native_maps_replace_those_that_c_knows():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    weight = torch.randn(2, 4, 6)
    for activation in ACTIVATIONS:
        maps = [
            learned(weight, None, activation, True, False, of_queries=queries)
            for queries in (True, False)
        ]
        problem = Problem(q, k, v, query_map=maps[0], key_map=maps[1])
        found = native.with_native_maps(problem)
        for x, old, new in ((q, maps[0], found.query_map), (k, maps[1], found.key_map)):
            assert (new.apply is not old.apply) == (activation in native.KINDS)
            torch.testing.assert_close(new.apply(x), old.apply(x), rtol=1e-5, atol=1e-6)
            assert new.width(4) == old.width(4)
    wide = problem._replace(q=q.double())
    assert native.with_native_maps(wide) is wide


def test_names_tell_the_activation():
    def name(activation, full=True, queries=False):
        return learned(None, None, activation, full, False, of_queries=queries).name

    assert name("softmax_dim") == "hedgehog:softmax_dim"
    assert name("exp", queries=True) == "hedgehog:exp_shifted"
    assert name("exp_dim", full=False) == "hedgehog:exp_dim:half"
    assert learned_features.width("relu", 5, True) == 5
