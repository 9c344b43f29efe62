"""Exact attention: equal to its equations in every form, with its derivatives."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ops.softmax_calls import INF, differentiable, serving, some_operands, tensors
from regard.core.budgets import budget, relative_error
from regard.ops.softmax import softmax_attention
from regard.ops.softmax.reference import softmax_reference


@pytest.mark.parametrize("seed", range(40))
def test_every_form_equals_the_equations(seed: int) -> None:
    choose = random.Random(seed)
    H, Hk = choose.choice(((4, 2), (3, 1), (2, 2)))
    T, S = choose.choice(((7, 7), (5, 9), (9, 5), (1, 6), (6, 1), (33, 33)))
    q, k, v = tensors(seed, H=H, Hk=Hk, T=T, S=S, Dv=choose.choice((3, 4, 6)))
    options = some_operands(seed, q, k, share=choose.choice((0.15, 0.4, 1.0)))

    expected_leaves = differentiable((q, k, v), expected_options := dict(options))
    expected, expected_lse = softmax_reference(
        *expected_leaves[:3], **expected_options, return_aux=True
    )
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = torch.autograd.grad((expected * weight).sum(), expected_leaves)

    forms = serving(q, k, v, **options)
    assert "eager" in forms
    for impl in forms:
        leaves = differentiable((q, k, v), form_options := dict(options))
        out = softmax_attention(*leaves[:3], **form_options, impl=impl)
        assert relative_error(out, expected) < budget(torch.float64)
        found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
        for leaf, got, want in zip(leaves, found, gradients, strict=True):
            got = torch.zeros_like(leaf) if got is None else got
            assert relative_error(got, want) < budget(torch.float64, "gradient"), impl
    _, aux = softmax_attention(q, k, v, **options, return_aux=True)
    assert torch.equal(aux.lse == -INF, expected_lse == -INF)
    finite = aux.lse > -INF
    assert relative_error(aux.lse[finite], expected_lse[finite]) < budget(torch.float64)


def test_the_reference_is_the_textbook_formula_entry_by_entry() -> None:
    q, k, v = tensors(B=1, H=1, Hk=1, T=3, S=4)
    log_decay = torch.tensor([[[-0.5, -0.25, -INF, -1.0]]], dtype=torch.float64)
    sink, cap = torch.tensor([0.3], dtype=torch.float64), 2.0
    out = softmax_reference(
        q, k, v, causal=True, scale=0.5, log_decay=log_decay, softcap=cap, sinks=sink
    )
    steps = log_decay[0, 0]
    for i in range(3):
        position = i + 1
        scores = {
            j: cap * torch.tanh(0.5 * (q[0, 0, i] @ k[0, 0, j]) / cap)
            + sum((steps[m] for m in range(j + 1, position + 1)), torch.tensor(0.0).double())
            for j in range(position + 1)
        }
        total = sink[0].exp() + sum(score.exp() for score in scores.values())
        row = sum(scores[j].exp() / total * v[0, 0, j] for j in scores)
        assert torch.allclose(out[0, 0, i], row, rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", ["native", "eager"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_where_torch_is_defined(impl: str, causal: bool) -> None:
    q, k, v = tensors(T=33, S=33, Dv=4, dtype=torch.float32)
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    out = softmax_attention(q, k, v, causal=causal, impl=impl)
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("impl", ["native", "eager"])
def test_float32_and_bfloat16_stay_in_their_budget(impl: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.requires_grad_() for x in tensors(T=40, S=50, D=16, Dv=16, dtype=dtype))
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.8
        out = softmax_attention(q, k, v, causal=True, key_mask=mask, impl=impl)
        expected = softmax_reference(*exact, causal=True, key_mask=mask)
        assert out.dtype == dtype
        assert relative_error(out, expected) < budget(dtype)
        got = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        want = torch.autograd.grad(expected.square().sum(), exact)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < budget(dtype, "gradient")


def test_long_decays_keep_float32_scores_exact() -> None:
    S = 20_000
    q, k, v = tensors(B=1, H=1, Hk=1, T=4, S=S, dtype=torch.float32)
    log_decay = -torch.rand(1, 1, S, generator=torch.Generator().manual_seed(0))
    out = softmax_attention(q, k, v, causal=True, log_decay=log_decay)
    expected = softmax_reference(
        q.double(), k.double(), v.double(), causal=True, log_decay=log_decay.double()
    )
    assert relative_error(out, expected) < budget(torch.float32)


def test_decay_is_the_bias_it_says() -> None:
    q, k, v = tensors(T=6, S=6)
    decay = -torch.rand(2, 2, 6, dtype=torch.float64)
    sums = decay.cumsum(2).repeat_interleave(2, 1)
    bias = sums[:, :, :, None] - sums[:, :, None, :]
    out = softmax_attention(q, k, v, causal=True, log_decay=decay)
    assert relative_error(out, softmax_attention(q, k, v, causal=True, bias=bias)) < 1e-13
    # Without the mask every query stands at the last key: the row's constant cancels.
    out = softmax_attention(q, k, v, log_decay=decay)
    assert relative_error(out, softmax_attention(q, k, v, key_bias=-decay.cumsum(2))) < 1e-13


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_eager_is_differentiable_twice(share: float) -> None:
    q, k, v = tensors(B=1, T=4, S=5, H=2, Hk=1, D=2, Dv=2)
    options = some_operands(3, q, k, share) | {"causal": True, "window": None}
    if "log_decay" in options:  # a difference quotient needs finite decays below 0
        options["log_decay"] = options["log_decay"].clamp(min=-1.0) - 0.1
        options["bias"] = options["bias"].clamp(min=-1.0)
    names = [n for n, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = differentiable((q, k, v), options)

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        changed = options | dict(zip(names, rest, strict=True))
        return softmax_attention(q, k, v, **changed, block_size=3, impl="eager")

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_the_fused_kernel_refuses_a_second_derivative() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = softmax_attention(q, k, v, impl="native")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented|derivative"):
        torch.autograd.grad(first.sum(), q)
