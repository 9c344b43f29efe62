"""Decoding with layers: the state after some tokens is all that the next ones need."""

from __future__ import annotations

import pickle
import re

import pytest
import torch

import regard
from mixers.subjects import BARE, DIM, FULL, build, by_name, check_close, having, tokens
from regard.core.group import StateGroup
from regard.core.patterns import Pattern
from regard.mixers import Attention

DECODING = having("state", "return_state", patterns=(Pattern.CAUSAL_SELF,))
ACROSS = having("state", "return_state", patterns=(Pattern.CAUSAL_CROSS,))
LENGTH = 7


def walk(layer, x, splits, state=None, **inputs):
    """The outputs of the pieces of x, one call after another."""
    outputs = []
    for piece in x.split(splits, 1):
        y, state = layer(piece, state=state, return_state=True, **inputs)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("splits", [[1] * LENGTH, [4, 1, 2], [0, 3, 4]], ids=str)
@pytest.mark.parametrize("card", DECODING, ids=by_name)
def test_step_by_step_equals_at_once(card, splits):
    layer = build(card, causal=True, **FULL)
    x = tokens(2, LENGTH)
    with torch.no_grad():
        y, state = walk(layer, x, splits)
        check_close(card, y, layer(x))
    assert state.length == LENGTH


@pytest.mark.parametrize("card", DECODING, ids=by_name)
def test_gradients_pass_through_the_state(card):
    layer = build(card, causal=True, **FULL)
    x = tokens(1, LENGTH).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(walk(layer, x, [3, 4])[0].square().sum(), x)
    check_close(card, found, expected, "gradient")


@pytest.mark.parametrize(
    "card", having("state", "key_mask", patterns=(Pattern.CAUSAL_SELF,)), ids=by_name
)
def test_ragged_prompts_go_on_as_if_alone(card):
    """Padded left, right and in between; then a step in which one row has nothing to add."""
    layer = build(card, causal=True, **FULL)
    x = torch.full((4, 6, DIM), torch.nan, dtype=torch.float64)
    mask = torch.zeros(4, 6).bool()
    places = [[2, 3, 4, 5], [0, 1, 4, 5], [0, 2, 3, 5], [1, 4]]
    rows = [tokens(1, len(place), seed=row) for row, place in enumerate(places)]
    for row, place in enumerate(places):
        mask[row, place], x[row, place] = True, rows[row][0]
    with torch.no_grad():
        y, state = layer(x[:, :4], key_mask=mask[:, :4], return_state=True)
        after, state = layer(x[:, 4:5], key_mask=mask[:, 4:5], state=state, return_state=True)
        last, state = layer(x[:, 5:], key_mask=mask[:, 5:], state=state, return_state=True)
        y = torch.cat([y, after, last], 1)
        new = tokens(4, 1, seed=9)
        beyond = layer(new, state=state)  # no mask any more
        for row, alone in enumerate(rows):
            expected = layer(torch.cat([alone, new[row : row + 1]], 1))[0]
            check_close(card, torch.cat([y[row, mask[row]], beyond[row]]), expected)


@pytest.mark.parametrize("card", ACROSS, ids=by_name)
def test_the_memory_is_remembered(card):
    layer = build(card, causal=True, kv_heads=2, qk_norm=True, output_gate=True)
    x, memory = tokens(2, 4), tokens(2, 5, seed=2)
    with torch.no_grad():
        expected = layer(x, memory)
        first, state = layer(x[:, :1], memory, return_state=True)
        assert state.length == 5
        rest, state = walk(layer, x[:, 1:], [1, 2], state)
        check_close(card, torch.cat([first, rest], 1), expected)
        assert state.length == 5
        more = tokens(2, 2, seed=3)  # the memory itself may grow
        grown = layer(x, more, state=state)
        check_close(card, grown, layer(x, torch.cat([memory, more], 1)))


@pytest.mark.parametrize("card", DECODING, ids=by_name)
def test_what_a_state_can_do(card, tmp_path):
    layer = build(card, causal=True, rope=True, qk_norm=True, short_conv=3)
    x = tokens(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    inputs = {"key_mask": mask} if card.accepts("key_mask") else {}
    with torch.no_grad():
        _, state = layer(x[:, :5], return_state=True, **inputs)
        expected = layer(x[:, 5:], state=state.fork())
        order = torch.tensor([1, 0, 1])
        chosen = layer(x[order, 5:], state=state.select(order))
        check_close(card, chosen, expected[order], "same")
        state.save(tmp_path / "state.safetensors")
        for again in (
            regard.load_state(tmp_path / "state.safetensors"),
            pickle.loads(pickle.dumps(state)),
            state.map(torch.clone),
            state.crop(5),
        ):
            assert isinstance(again, StateGroup)
            assert torch.equal(layer(x[:, 5:], state=again), expected)
        with pytest.raises(ValueError, match=r"crop\(3\) needs the past"):
            state.crop(3)


@pytest.mark.parametrize("card", [card for card in DECODING if card.state == "cache"], ids=by_name)
def test_without_a_convolution_a_cache_is_cropped(card):
    layer = build(card, causal=True, rope=True)
    x = tokens(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        _, state = layer(x[:, :5], key_mask=mask, return_state=True)
        _, shorter = layer(x[:, :3], key_mask=mask[:, :3], return_state=True)
        expected = layer(x[:, 5:], state=shorter)
        check_close(card, layer(x[:, 5:], state=state.crop(3)), expected, "same")


def test_a_state_in_half_precision():
    layer = build(regard.mechanisms["softmax"], causal=True, **FULL)
    x = tokens(1, 5)
    with torch.no_grad():
        _, state = layer(x[:, :4], return_state=True)
        expected = layer(x[:, 4:], state=state.fork())
        half = state.map(lambda t: t.to(torch.bfloat16))
        y = layer.bfloat16()(x[:, 4:].bfloat16(), state=half)
    check_close(layer.card, y, expected, dtype=torch.bfloat16)


def test_looking_both_ways_over_what_is_known():
    """Without causality a state gives every new token all that came, and each other."""
    layer = build(regard.mechanisms["softmax"], rope=True)
    x = tokens(1, 6)
    with torch.no_grad():
        _, state = layer(x[:, :4], return_state=True)
        check_close(layer.card, layer(x[:, 4:], state=state), layer(x)[:, 4:])


@pytest.mark.parametrize(
    ("made_by", "settings", "memory", "message"),
    [
        ({}, {"short_conv": 2}, False, "state must be one with short_conv, as this layer's"),
        ({"short_conv": 2}, {}, False, "state must be one without short_conv, as this layer's"),
        ({}, {}, True, "state must be one of cross_attention, got one of self_attention"),
        ({"kv_heads": 2}, {}, False, "k must be the state's float32 [2, 2, ., 4] on cpu"),
    ],
)
def test_a_state_of_another_layer_is_refused(made_by, settings, memory, message):
    x = tokens(2, 3, dtype=torch.float32)
    _, state = Attention(DIM, 4, causal=True, **made_by)(x, return_state=True)
    layer = Attention(DIM, 4, causal=True, **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(x, x if memory else None, state=state)


def test_a_state_of_other_rows_is_refused():
    for settings in ({}, {"short_conv": 2}, {"mechanism": "linear", "rope": True}):
        layer, x = Attention(DIM, 4, causal=True, **settings), tokens(3, 2, dtype=torch.float32)
        _, state = layer(x, return_state=True)
        with pytest.raises(ValueError, match="state must be of x's batch size 2, got one of 3"):
            layer(x[:2], state=state)


def test_a_state_of_another_kernel_size_is_refused():
    x = tokens(2, 3, dtype=torch.float32)
    _, state = Attention(DIM, 4, causal=True, short_conv=3)(x, return_state=True)
    with pytest.raises(ValueError, match=r"past must be of shape \[2, 1, 48\]"):
        Attention(DIM, 4, causal=True, short_conv=2)(x, state=state)


def test_a_cross_state_needs_a_cross_layer():
    x = tokens(2, 3, dtype=torch.float32)
    layer = Attention(DIM, 4)
    _, state = layer(x, x, return_state=True)
    with pytest.raises(ValueError, match="memory must be None with rope"):
        Attention(DIM, 4, rope=True)(x, state=state)
    _, state = layer(x, return_state=True)
    layer(x, state=state)
    with pytest.raises(ValueError, match="was already continued"):
        layer(x, state=state)


def test_a_mechanism_without_state_says_so():
    x = tokens(2, 3, dtype=torch.float32)
    _, state = Attention(DIM, 4)(x, return_state=True)
    with pytest.raises(ValueError, match="state must be left out with mechanism 'bare'"):
        Attention(DIM, 4, mechanism=BARE)(x, state=state)
