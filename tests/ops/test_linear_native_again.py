"""Calls like one before, which go straight to C: the same bits; others are checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.native import instruction_sets, limited_to
from regard.ops.delta import delta_attention
from regard.ops.gated_delta import gated_delta_attention
from regard.ops.hedgehog import hedgehog_attention
from regard.ops.lightning import lightning_attention
from regard.ops.linear import linear_attention
from regard.ops.linear.native import again
from regard.ops.relu_linear import relu_linear_attention

attend = importlib.import_module("regard.ops.linear.attend")

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="no native library here")

T, D = 37, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    beta, decay = normal(2, 2, T, seed=3).sigmoid(), -normal(2, 1, T, seed=4).abs()
    maps = {"map_q": normal(4, D, D) / 4, "map_k": normal(1, D, D, seed=1) / 4}
    past = {"causal": True}
    plain = {**past, "feature_map": "identity", "normalise": False}
    return {
        "lightning": (lightning_attention, {**past, "log_decay": decay}),
        "scaled lightning": (lightning_attention, {**past, "log_decay": decay, "scale": 0.3}),
        "linear": (linear_attention, plain),
        "per channel": (linear_attention, {**plain, "log_decay": -normal(2, 2, T, D).abs()}),
        "delta": (delta_attention, {**past, "beta": beta}),
        "gated delta": (gated_delta_attention, {**past, "beta": beta, "log_decay": decay}),
        "hedgehog": (hedgehog_attention, {**past, **maps}),
        "relu": (relu_linear_attention, {**past, "minimum": 3.0}),
        "relu, whole": (relu_linear_attention, {"temperature": 0.5}),
        "elu, whole": (linear_attention, {}),
    }


def qkv() -> list[Tensor]:
    return [normal(2, heads, T, D, seed=i) for i, heads in enumerate((4, 2, 2))]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call whose arguments were checked; nothing is known yet."""
    found: list[int] = []
    check = attend.check
    monkeypatch.setattr(attend, "check", lambda *x: found.append(1) or check(*x))
    again.known.clear()
    return found


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", calls())
def test_a_second_call_is_not_checked_and_brings_the_same_bits(isa, name, checked):
    op, options = calls()[name]
    with limited_to(isa):
        first, before = op(*qkv(), **options, return_state=True)
        second, state = op(*qkv(), **options, return_state=True)
        plain = op(*qkv(), **options)
        assert len(checked) == 2  # with and without a state to bring
        again.known.clear()
        third = op(*qkv(), **options)
        assert torch.equal(plain, third)
    assert torch.equal(first, second)
    assert torch.equal(first, plain)
    assert dict(state.tensors).keys() == dict(before.tensors).keys()
    assert state.length == before.length == T
    assert all(torch.equal(state[x], before[x]) for x in before.tensors)


@pytest.mark.parametrize("name", calls())
def test_it_goes_on_from_a_state(name, checked):
    op, options = calls()[name]
    _, state = op(*qkv(), **options, return_state=True)
    for _ in range(2):
        out, after = op(*qkv(), **options, state=state, return_state=True)
    assert len(checked) == 2
    again.known.clear()
    other, following = op(*qkv(), **options, state=state, return_state=True)
    assert torch.equal(out, other)
    assert after.length == following.length == 2 * T
    assert all(torch.equal(after[x], following[x]) for x in after.tensors)


def test_another_call_is_checked(checked):
    op, options = calls()["gated delta"]
    q, k, v = qkv()
    op(q, k, v, **options)
    expected = op(q, k, v, **options)
    assert len(checked) == 1
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(op(q, turned, v, **options), expected)
    assert len(checked) == 2
    op(q, k, v, **{**options, "scale": 0.5})
    op(q, k, v, **{**options, "normalise_keys": False})
    op(q, k, v[..., :8], **options)
    assert len(checked) == 5
    wanted = q.clone().requires_grad_()
    assert op(wanted, k, v, **options).requires_grad
    with torch.no_grad():
        assert torch.equal(op(wanted, k, v, **options), expected)
    assert len(checked) == 6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(q, k, v, **options).dtype == torch.bfloat16
    torch.vmap(lambda q: op(q, k, v, **options))(q[None])
    assert len(checked) == 8


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"k": normal(2, 2, T, D + 1)}, ValueError),
        ({"v": normal(2, 2, T + 1, D)}, ValueError),
        ({"beta": normal(2, 2, T - 1)}, ValueError),
        ({"log_decay": 1.0}, TypeError),
        ({"q": [1.0]}, TypeError),
        ({"impl": "fastest"}, ValueError),
        ({"impl": ["auto"]}, ValueError),
        ({"return_state": 1}, TypeError),
        ({"causal": 1}, TypeError),
        ({"scale": True}, TypeError),
    ],
)
def test_bad_arguments_are_still_told(change, error, checked):
    op, options = calls()["gated delta"]
    given = dict(zip("qkv", qkv(), strict=True)) | options
    for _ in range(2):
        op(**given)
    with pytest.raises(error, match="gated_delta_attention"):
        op(**(given | change))


def test_weights_may_change_and_may_ask_for_a_gradient(checked):
    op, options = calls()["hedgehog"]
    for _ in range(2):
        op(*qkv(), **options)
    doubled = {**options, "map_q": 2 * options["map_q"]}
    out = op(*qkv(), **doubled)
    assert len(checked) == 1
    again.known.clear()
    assert torch.equal(op(*qkv(), **doubled), out)
    learnt = {**options, "map_k": options["map_k"].clone().requires_grad_()}
    assert op(*qkv(), **learnt).requires_grad


def test_what_is_known_does_not_grow_without_end(checked, monkeypatch):
    monkeypatch.setattr(again, "_MOST", 3)
    q, k, v = qkv()
    for length in range(1, 9):
        lightning_attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], causal=True)
        assert len(again.known) <= 3
