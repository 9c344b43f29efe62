"""torch's signature: the same results with the default mechanism, or a refusal by name."""

from __future__ import annotations

import inspect
import re
from itertools import product

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torchs

import regard
from mixers.subjects import BARE, TOY
from regard.core.budgets import budget, relative_error

ours = regard.scaled_dot_product_attention


def sample(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def agree(found, expected, inputs, quantity="value"):
    """Values, shapes, dtypes and gradients."""
    assert found.dtype == expected.dtype
    dtype = found.dtype
    assert relative_error(found, expected) <= budget(dtype, quantity)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape).to(dtype)
    for one, other in zip(
        torch.autograd.grad(found, inputs, weights, retain_graph=True),
        torch.autograd.grad(expected, inputs, weights, retain_graph=True),
        strict=True,
    ):
        assert relative_error(one, other) <= budget(dtype, "gradient")


def test_the_signature_is_torchs():
    found = list(inspect.signature(ours).parameters.values())
    assert [p.name for p in found[:-2]] == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    assert [p.default for p in found[3:-2]] == [None, 0.0, False, None, False]
    assert found[-2].kind is inspect.Parameter.KEYWORD_ONLY


SHAPES = {
    "2-d": [(4, 6), (5, 6), (5, 3)],
    "3-d": [(2, 4, 6), (2, 5, 6), (2, 5, 3)],
    "4-d": [(2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 3)],
    "5-d": [(2, 2, 3, 4, 6), (2, 2, 3, 5, 6), (2, 2, 3, 5, 3)],
    "broadcast": [(2, 3, 4, 6), (1, 3, 5, 6), (2, 1, 5, 3)],
    "fewer leading": [(2, 3, 4, 6), (5, 6), (3, 5, 3)],
}
MASKS = [(), (1, 1), (4, 1), (1, 5), (4, 5)]


@pytest.mark.parametrize("mask", [None, bool, float])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_and_mask(name, mask):
    inputs = sample(*SHAPES[name])
    lead = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in inputs))
    if mask is None:
        for scale in (None, 0.3):
            agree(ours(*inputs, scale=scale), torchs(*inputs, scale=scale), inputs)
        return
    leading = set(product(*((1, size) for size in lead))) | {lead[1:], ()}
    for lead_of_mask, last in product(leading, MASKS[1:]):
        (attn_mask,) = sample((*lead_of_mask, *last), seed=7)
        attn_mask = attn_mask.detach()
        if mask is bool:
            attn_mask = attn_mask > -0.5
        agree(ours(*inputs, attn_mask), torchs(*inputs, attn_mask), inputs)


@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 5), (5, 3), (1, 4), (4, 1), (0, 2)])
def test_is_causal_is_aligned_at_the_start(T, S):
    inputs = sample((2, 3, T, 4), (2, 3, S, 4), (2, 3, S, 2))
    agree(ours(*inputs, is_causal=True), torchs(*inputs, is_causal=True), inputs)
    inputs = sample((2, T, 4), (2, S, 4), (2, S, 2))
    agree(ours(*inputs, is_causal=True), torchs(*inputs, is_causal=True), inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_enable_gqa(lead, causal):
    inputs = sample((*lead, 4, 5, 6), (*lead, 2, 5, 6), (*lead, 2, 5, 6))
    options = {"is_causal": causal, "enable_gqa": True}
    agree(ours(*inputs, **options), torchs(*inputs, **options), inputs)
    (mask,) = sample((4, 5, 5), seed=7)
    mask = mask.detach() > -0.5
    found, expected = ours(*inputs, mask, enable_gqa=True), torchs(*inputs, mask, enable_gqa=True)
    agree(found, expected, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    inputs = sample(*SHAPES["4-d"], dtype=dtype)
    (mask,) = sample((2, 1, 1, 5), dtype=torch.float32, seed=7)
    for attn_mask in (None, mask.detach(), mask.detach() > -0.5):
        agree(ours(*inputs, attn_mask), torchs(*inputs, attn_mask), inputs)


def test_hidden_keys_and_rows_that_see_nothing():
    inputs = sample(*SHAPES["4-d"])
    seen = torch.ones(2, 1, 4, 5).bool()
    seen[0, :, 1], seen[1, :, :, 3] = False, False
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    for mask in (seen, added):
        out = ours(*inputs, mask)
        assert not out[0, :, 1].any()
        agree(out, torchs(*inputs, mask), inputs)


def test_a_mask_learns():
    inputs = sample(*SHAPES["4-d"], (3, 4, 5))
    agree(ours(*inputs), torchs(*inputs), inputs)


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = sample(*SHAPES["4-d"], dtype=torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    agree(compiled(*inputs, is_causal=True), torchs(*inputs, is_causal=True), inputs)
    torch._dynamo.reset()


@pytest.mark.parametrize("T", [3, 6, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", list(regard.mechanisms))
def test_other_mechanisms(name, causal, T):
    """The op itself, on the keys that torch's alignment shows to each query."""
    card = regard.mechanisms[name]
    if card.operands or not any(pattern.causal == causal for pattern in card.patterns):
        with pytest.raises((TypeError, ValueError), match="scaled_dot_product_attention: "):
            ours(
                *sample((1, 2, T, 4), (1, 2, 6, 4), (1, 2, 6, 4)), mechanism=name, is_causal=causal
            )
        return
    options = dict(card.cases[0].options)
    if "window" in options:  # a query behind the last key is further away from the others
        T = min(T, 6)
    q, k, v = sample((2, 2, T, 4), (2, 2, 6, 4), (2, 2, 6, 4))
    found = ours(q, k, v, is_causal=causal, mechanism=name, **options)
    if not causal:
        expected = card.op(q, k, v, **options)
    else:
        rows = [  # each query last among the keys up to its own position
            card.op(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True, **options)
            for i in range(T)
        ]
        expected = torch.cat(rows, 2)
    assert relative_error(found, expected) <= budget(torch.float64)


def of_queries_and_keys_alone(name):
    """Whether the mechanism can be called with q, k, v and a mask of keys, without causality."""
    card = regard.mechanisms[name]
    both_ways = any(not pattern.causal for pattern in card.patterns)
    placeless = "window" not in card.cases[0].options and "padding" not in card.laws_except
    return both_ways and placeless and not card.operands and card.accepts("key_mask")


@pytest.mark.parametrize("name", [*filter(of_queries_and_keys_alone, regard.mechanisms)])
def test_masks_of_keys_with_other_mechanisms(name):
    card = regard.mechanisms[name]
    q, k, v = sample((1, 2, 3, 4), (1, 2, 6, 4), (1, 2, 6, 4))
    seen = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    expected = card.op(q, k[:, :, seen], v[:, :, seen])
    found = ours(q, k, v, seen[None], mechanism=name)
    assert relative_error(found, expected) <= budget(torch.float64)
    if card.accepts("key_bias"):
        heads = torch.stack([seen, ~seen])[None, :, None]
        other = card.op(q[:, 1:], k[:, 1:, ~seen], v[:, 1:, ~seen])
        both = torch.cat([expected[:, :1], other], 1)
        added = torch.zeros(heads.shape, dtype=q.dtype).masked_fill(~heads, -torch.inf)
        for mask in (heads, added):
            out = ours(q, k, v, mask, mechanism=name)
            agree(out, both, (q, k, v))


def test_a_card_and_its_operands():
    q, k, v = sample((1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 5))
    operands = {
        "gate": torch.rand(1, 2, 4),
        "strength": torch.rand(1, 2, 4),
        "log_decay": -torch.rand(1, 4, 2),
        "offset": torch.rand(2, 3),
    }
    found = ours(q, k, v, is_causal=True, mechanism=TOY, **operands)
    assert torch.equal(found, TOY.op(q, k, v, causal=True, **operands))


Q = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0.0 (there may be no weights to drop: apply"),
        (
            {"is_causal": True, "attn_mask": torch.ones(3, 3)},
            "attn_mask must be None with is_causal",
        ),
        ({"is_causal": 1}, "is_causal must be True or False, got 1"),
        ({"query": 3}, "query must be a torch.Tensor, got 3"),
        ({"query": torch.zeros(3)}, "query must be [..., heads, length, channels]"),
        (
            {"key": Q[:, :2], "value": Q[:, :2]},
            "enable_gqa=True allows fewer heads of",
        ),
        (
            {"attn_mask": torch.zeros(3, 4)},
            "attn_mask must be broadcastable to [2, 4, 3, 3]",
        ),
        ({"attn_mask": torch.zeros(3, 3).long()}, "attn_mask must be a bool or floating-point"),
        ({"attn_mask": torch.zeros(1, 2, 4, 3, 3)}, "attn_mask must be broadcastable to"),
        ({"windw": (1, 1)}, "windw must be an argument of softmax_attention ("),
        ({"windw": (1, 1)}, "got 'windw'; did you mean 'window'?"),
        ({"key_mask": torch.ones(2, 3).bool()}, "key_mask must be left out, got it: use attn_mask"),
        ({"causal": True}, "causal must be left out, got it: use is_causal"),
        ({"return_state": True}, "return_state must be left out, got it: use the op itself"),
        (
            {"mechanism": "local_linear", "attn_mask": torch.ones(3, 3).bool()},
            "attn_mask must be the same for all queries with mechanism 'local_linear' (for a",
        ),
        (
            {"mechanism": "linear", "attn_mask": torch.zeros(1, 3)},
            "attn_mask must be bool, the same for all queries and heads, with mechanism 'linear'",
        ),
        ({"mechanism": BARE, "attn_mask": torch.zeros(1, 3)}, "attn_mask must be None with mech"),
        ({"mechanism": BARE, "scale": 1.0}, "scale must be None with mechanism 'bare'"),
        (
            {"mechanism": BARE, "key": Q[:, :, :2], "value": Q[:, :, :2], "is_causal": True},
            "query must be at most as long as key with mechanism 'bare' and is_causal",
        ),
        ({"mechanism": TOY}, "is_causal must be True with mechanism 'toy', got False"),
        (
            {"mechanism": TOY, "is_causal": True},
            "gate, strength, log_decay, offset must be given for mechanism 'toy', got nothing",
        ),
        (
            {"query": Q[0], "key": Q[0], "value": Q[0], "sinks": torch.zeros(4)},
            "sinks must be no tensor, unless inputs have four dimensions",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        ours(**{"query": Q, "key": Q, "value": Q, **arguments})
    assert str(caught.value).startswith("scaled_dot_product_attention: ")
