"""`regard.explain`: which form runs, and why not the others."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.testing.calls import ARGUMENTS, sample


def qkv(**changes):
    return [torch.randn(1, 2, 5, 8, **changes) for _ in range(3)]


def arguments(card) -> dict[str, torch.Tensor]:
    """q, k, v and the operands that the mechanism needs beside them."""
    sizes = {"b": 1, "h": 2, "hk": 2, "t": 5, "s": 5, "d": 8, "dv": 8}
    sizes |= {name.lower(): size for name, size in card.cases[0].dims.items()}
    wanted = (*ARGUMENTS, *card.operands)
    call = sample(wanted, sizes, torch.Generator().manual_seed(0)).to(torch.float32)
    return {**call.tensors, **card.cases[0].options}


@pytest.mark.parametrize("name", list(regard.mechanisms))
def test_every_op_can_be_explained(name) -> None:
    card = regard.mechanisms[name]
    op = card.op
    told = regard.explain(op, **arguments(card))
    assert told.op == op.__name__
    assert told.impl == told.available[0]
    assert told.reasons[told.form] is None
    assert str(told).startswith(f"{told.op}: runs {told.form}")
    for form in told.reasons:
        assert form in str(told)


@pytest.mark.parametrize("name", list(regard.mechanisms))
def test_what_is_available_runs_and_what_is_not_raises(name) -> None:
    card = regard.mechanisms[name]
    op, inputs = card.op, arguments(card)
    available = regard.explain(op, **inputs).available
    for impl in ("reference", "eager", "native", "triton"):
        if impl in available:
            assert regard.explain(op, **inputs, impl=impl).impl == impl
            assert op(**inputs, impl=impl).shape == inputs["q"].shape
        else:
            with pytest.raises(ValueError, match=f"impl='{impl}' cannot serve"):
                regard.explain(op, **inputs, impl=impl)


def test_an_option_changes_the_form() -> None:
    op = regard.ops.softmax_attention
    told = regard.explain(op, *qkv(), softcap=2.0)
    assert "native" not in told.available
    refused = [reason for reason in told.reasons.values() if reason]
    assert any("softcap" in reason for reason in refused)


def test_nothing_is_computed_and_meta_tensors_do() -> None:
    told = regard.explain(regard.ops.softmax_attention, *qkv(device="meta"))
    assert told.available
    q = torch.full((1, 2, 5, 8), torch.nan, requires_grad=True)
    before = q._version
    regard.explain(regard.ops.softmax_attention, q, q, q)
    assert q._version == before


def test_wrong_arguments_raise_as_in_the_call() -> None:
    with pytest.raises(ValueError, match="softmax_attention: q must be 4-dimensional"):
        regard.explain(regard.ops.softmax_attention, torch.zeros(2, 3), *qkv()[1:])
    with pytest.raises(ValueError, match="impl must be one of"):
        regard.explain(regard.ops.softmax_attention, *qkv(), impl="eagre")
    with pytest.raises(TypeError, match="chooses no form"):
        regard.explain(torch.nn.functional.scaled_dot_product_attention, *qkv())
    with pytest.raises(TypeError, match="op must be an op of regard itself.*got 'softmax'"):
        regard.explain("softmax", *qkv())


def test_the_next_call_computes_again() -> None:
    regard.explain(regard.ops.softmax_attention, *qkv())
    assert isinstance(regard.ops.softmax_attention(*qkv()), torch.Tensor)
    with pytest.raises(ValueError, match="q must be"):
        regard.explain(regard.ops.softmax_attention, torch.zeros(2), *qkv()[1:])
    assert isinstance(regard.ops.softmax_attention(*qkv()), torch.Tensor)
