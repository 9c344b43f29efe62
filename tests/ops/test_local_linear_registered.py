"""The registration that all compiled forms of the engine share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.core.budgets import relative_error
from regard.ops.local_linear import call as calls
from regard.ops.local_linear.backward import backward
from regard.ops.local_linear.blockwise import forward
from regard.ops.local_linear.registered import Extra, local_linear_fwd, register

SEEN = []


def twice_forward(inputs, options):
    result = forward(inputs, options.solver(inputs.q.shape[3]), options.block_size)
    return (*result, 2 * result.lse)


def twice_backward(inputs, options, grad, slope, lse, extras, wanted):
    SEEN.append(torch.equal(extras[0], 2 * lse))
    solver = options.solver(inputs.q.shape[3], backward=True)
    return backward(inputs, grad, slope, lse, wanted, solver, options.block_size)


@pytest.fixture(scope="module")
def twice():
    """The eager form again, with one more result that its backward is given."""
    extra = Extra("twice", lambda inputs: inputs.q.shape[:3])
    return register("test_local_linear_twice", twice_forward, twice_backward, (extra,))


def sample(*, grad=True):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 9, 8, generator=generator).requires_grad_(grad) for _ in range(3)]


def a_call(q, k, v, **changes):
    call = calls.Call(q, k, v, True, 1.0, "relative", None, None, None, None, None, 1e-4, 1e-6)
    return replace(call, **changes)


def test_average_is_softmax_attention_with_its_gradients():
    """g = 0: outputs, log-sum-exp and gradients of q, k and v."""
    q, k, v = sample()
    out, lse, slope, iterations, residual = calls.run(
        local_linear_fwd, a_call(q, k, v, average=True)
    )
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert relative_error(out, exact) < 1e-6
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    assert relative_error(lse, scores.double().logsumexp(-1)) < 1e-6
    assert not any(x.any() for x in (slope, iterations, residual))
    e = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), e)
    wanted = torch.autograd.grad(exact, (q, k, v), e.double())
    for x, y in zip(found, wanted, strict=True):
        assert relative_error(x, y) < 1e-6


def test_extras_come_back_in_the_backward(twice):
    q, k, v = sample()
    out, *_ = calls.run(twice, a_call(q, k, v))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    plain, *_ = calls.run(local_linear_fwd, a_call(q, k, v))
    assert SEEN
    assert all(SEEN)
    for x, y in zip(grads, torch.autograd.grad(plain.sum(), (q, k, v)), strict=True):
        assert torch.equal(x, y)


def test_registration_is_sound_with_extras(twice):
    q, k, v = sample()
    call = a_call(q, k, v)
    torch.library.opcheck(twice, (*calls.operands(call), *calls.options(call)))


def test_vmap_folds_extras_too(twice):
    q, k, v = sample(grad=False)
    each = torch.vmap(
        lambda q, k, v: twice(*calls.operands(a_call(q, k, v)), *calls.options(a_call(q, k, v)))
    )
    results = each(*(x[:, None] for x in (q, k, v)))
    whole = twice(*calls.operands(a_call(q, k, v)), *calls.options(a_call(q, k, v)))
    assert len(results) == 6
    for x, y in zip(results, whole, strict=True):
        assert torch.allclose(x[:, 0], y, atol=1e-6)
