"""Exact attention: what a query does not see reaches no output and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.softmax_calls import FORMS, INF, serving, tensors
from regard.core.budgets import relative_error
from regard.ops.softmax import SoftmaxAux, softmax_attention


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("options", [{}, {"window": (3, 2)}, {"key_mask": True}, {"softcap": 2.0}])
@pytest.mark.parametrize(("T", "S"), [(12, 12), (5, 12), (12, 9)])
def test_the_future_changes_no_bit(impl: str, options: dict[str, Any], T: int, S: int) -> None:
    options = dict(options)
    q, k, v = tensors(T=T, S=S, D=8, Dv=8, dtype=torch.float32)
    if "key_mask" in options:
        options["key_mask"] = torch.arange(S).expand(2, S) != torch.tensor([[0], [3]])
    if impl not in serving(q, k, v, causal=True, **options):
        return
    seen = max(5, S - T + 2)  # keys; the queries that see no more are the first `rows`
    rows = seen + T - S

    def run(largest: float | None) -> list[Tensor]:
        k2, v2 = k.clone(), v.clone()
        if largest is not None:
            junk = torch.tensor([largest, -largest, 1e4, -1.0]).repeat(3)[: S - seen, None]
            k2[:, :, seen:], v2[:, :, seen:] = junk, -junk
        leaves = [x.clone().requires_grad_() for x in (q, k2, v2)]
        out = softmax_attention(*leaves, causal=True, **options, impl=impl)[:, :, :rows]
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        return [out, *gradients]

    clean = run(None)
    assert all(x.isfinite().all() for x in clean)
    for largest in (1e4, 1e30):
        for a, b in zip(clean, run(largest), strict=True):
            assert torch.equal(a, b), largest
    if impl == "eager":  # the later rows' own scores overflow: their 0 gradients are NaN
        assert torch.equal(clean[0], run(3e38)[0])


def test_future_biases_and_decays_change_no_bit() -> None:
    q, k, v = tensors(T=9, S=9, dtype=torch.float32)
    key_bias, decay, bias = torch.randn(2, 2, 9), -torch.rand(2, 1, 9), torch.randn(9, 9)
    junk = [key_bias.clone(), decay.clone(), bias.clone()]
    junk[0][..., 4:], junk[1][..., 4:] = 1e30, -INF
    junk[2][:, 4:], junk[2][:4, 4:] = 1e30, torch.nan
    results = []
    for a, b, c in ((key_bias, decay, bias), junk):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, a, b, c)]
        names = dict(zip(("key_bias", "log_decay", "bias"), leaves[3:], strict=True))
        out = softmax_attention(*leaves[:3], causal=True, **names)[:, :, :4]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_reach_nothing(impl: str, causal: bool) -> None:
    q, k, v = tensors(T=8, S=8, Dv=4)
    key_mask = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 0, 0]]).bool()
    extras = {} if impl == "native" else {"key_bias": torch.randn(2, 1, 8).double()}
    if extras:
        extras["log_decay"] = -torch.rand(2, 2, 8).double()
    clean = [x.requires_grad_() for x in (q, k, v, *extras.values())]
    dirty = [q.detach().clone()]
    for x in (k, v, *extras.values()):
        hidden = ~key_mask[:, None, :, None] if x.dim() == 4 else ~key_mask[:, None]
        dirty.append(x.detach().masked_fill(hidden, torch.nan))
    dirty = [x.requires_grad_() for x in dirty]
    results = []
    for leaves in (clean, dirty):
        named = dict(zip(extras, leaves[3:], strict=True))
        out = softmax_attention(*leaves[:3], causal=causal, key_mask=key_mask, **named, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    # And they are as good as absent.
    row = key_mask[1]
    alone = softmax_attention(q[1:, :, row], k[1:, :, row], v[1:, :, row], causal=causal)
    if impl == "native":
        assert relative_error(results[0][0][1:, :, row], alone) < 1e-12


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (1, 1)])
def test_rows_without_keys_are_zero(impl: str, causal: bool, window: Any) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(T=7, S=4, Dv=4))
    key_mask = torch.tensor([[False] * 4, [False, True, True, True]])
    out = softmax_attention(q, k, v, causal=causal, window=window, key_mask=key_mask, impl=impl)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[0] == 0).all()
    assert all((g[0] == 0).all() and g.isfinite().all() for g in gradients)
    if causal:
        assert (out[:, :, :4] == 0).all()
    assert (out[1, :, -2:] != 0).all()


def test_rows_without_keys_have_no_log_sum_and_keep_sinks_harmless() -> None:
    q, k, v = tensors(T=3, S=2)
    sinks = torch.tensor([0.0, -INF, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    key_mask = torch.tensor([[False, False], [True, True]])
    out, aux = softmax_attention(q, k, v, sinks=sinks, key_mask=key_mask, return_aux=True)
    assert isinstance(aux, SoftmaxAux)
    assert aux.lse.shape == (2, 4, 3)
    assert (aux.lse[0] == -INF).all()
    (gradient,) = torch.autograd.grad(out.square().sum(), sinks)
    assert gradient.isfinite().all()
    assert gradient[1] == 0
    plain = softmax_attention(q, k, v, key_mask=key_mask, impl="eager")
    assert torch.equal(out[:, 1], plain[:, 1])
    assert (out[0] == 0).all()
