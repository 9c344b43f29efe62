"""The division by the sum of weights, plain, clamped from below, or with an epsilon."""

from __future__ import annotations

import pytest
import torch

from regard.core.budgets import budget, relative_error
from regard.ops.linear.attend import attend, mechanism
from regard.ops.linear.features import RELU
from regard.ops.linear.normaliser import mean
from regard.ops.linear.problem import Problem

SETTINGS = [{}, {"minimum": 0.7}, {"epsilon": 0.3}, {"minimum": 0.7, "epsilon": 0.3}]


def plain(sums, minimum=None, epsilon=0.0):
    weight = sums[..., -1:] + epsilon
    if minimum is not None:
        weight = weight.clamp(min=minimum)
    return sums[..., :-1] / weight


@pytest.mark.parametrize("settings", SETTINGS)
def test_value_and_gradient(settings):
    sums = torch.rand(3, 20, 4, dtype=torch.float64, requires_grad=True)
    out, expected = mean(sums, **settings), plain(sums, **settings)
    assert relative_error(out, expected) < 1e-15
    (got,), (wanted,) = (
        torch.autograd.grad(x.sin().sum(), sums, retain_graph=True) for x in (out, expected)
    )
    assert relative_error(got, wanted) < 1e-14
    mapped = torch.func.vmap(lambda x: mean(x, **settings))(sums)
    assert torch.equal(mapped, out)
    weights = torch.rand(2, *out.shape, dtype=torch.float64)
    many = torch.autograd.grad(out, sums, weights, is_grads_batched=True)[0]
    for weight, gradient in zip(weights, many, strict=True):
        (wanted,) = torch.autograd.grad(expected, sums, weight, retain_graph=True)
        assert relative_error(gradient, wanted) < 1e-14


def test_rows_without_weight():
    nothing = torch.zeros(2, 3, requires_grad=True)
    for settings in SETTINGS:
        out = mean(nothing, **settings)
        assert not out.any()
        assert torch.autograd.grad(out.sum(), nothing)[0].isfinite().all()


def test_a_row_without_a_gradient_has_none_though_it_overflowed():
    sums = torch.tensor([[1.0, 2.0], [torch.inf, torch.inf]], requires_grad=True)
    for settings in SETTINGS:
        (gradient,) = torch.autograd.grad(mean(sums, **settings)[0].sum(), sums)
        assert not gradient[1].any()


def test_registration():
    sums = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.regard.linear_mean_fwd, (sums, 0.5, 0.1))
    out, weight = (x.detach() for x in torch.ops.regard.linear_mean_fwd(sums, 0.5, 0.1))
    torch.library.opcheck(
        torch.ops.regard.linear_mean_bwd, (torch.ones_like(out), out, weight, 0.5)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "settings", [{"normaliser": 2.0}, {"normaliser": "sum", "epsilon": 1e-3}], ids=str
)
def test_a_mechanism_with_either(causal, settings):
    """The engine's way to it: relu features, against the matrix of weights; state in and out."""

    def reference(problem, state):
        raise AssertionError

    owner = mechanism("toy", "toy", reference)
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 90, 4, generator=make, dtype=torch.float64) for _ in range(3))
    weights = q.relu() @ k.relu().mT
    weights = weights.tril() if causal else weights
    total = weights.sum(-1, keepdim=True)
    divisor = total.clamp(min=2.0) if settings["normaliser"] == 2.0 else total + 1e-3
    problem = Problem(q, k, v, causal, RELU, RELU, **settings)
    out, state = attend(owner, problem, return_state=True)
    assert relative_error(out, weights @ v / divisor) < budget(torch.float64)
    assert set(state.tensors) == {"S", "z"}
    at, parts, state = 37, [], None
    if causal:
        for piece in (slice(None, at), slice(at, None)):
            part = problem._replace(q=q[:, :, piece], k=k[:, :, piece], v=v[:, :, piece])
            found, state = attend(owner, part, state=state, return_state=True)
            parts.append(found)
        assert relative_error(torch.cat(parts, 2), out) < budget(torch.float64)
    twice = attend(owner, problem, finish=lambda solution: 2 * solution.out)
    assert torch.equal(twice, 2 * out)
