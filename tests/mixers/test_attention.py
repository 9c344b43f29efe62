"""The attention layer, with every mechanism that has a card."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

import regard
from mixers.subjects import (
    BARE,
    CARDS,
    DIM,
    FULL,
    HEADS,
    PLANNED,
    TOY,
    build,
    by_name,
    check_close,
    having,
    tokens,
)
from regard.core.patterns import Pattern
from regard.mixers import Attention, rotate
from regard.mixers.operands import is_probe

OFFSETS = torch.tensor([0, 3], dtype=torch.int32)


def causal_of(card):
    """A causality in which the mechanism serves self-attention."""
    return Pattern.CAUSAL_SELF in card.patterns


@pytest.mark.parametrize("pattern", Pattern, ids=lambda p: p.value)
@pytest.mark.parametrize("card", CARDS, ids=by_name)
def test_is_the_op_between_projections(card, pattern):
    if pattern not in card.patterns:
        memory = tokens(2, 4) if pattern.cross else None
        with pytest.raises(ValueError, match=r"Attention: (causal|memory) must be"):
            build(card, causal=pattern.online)(tokens(2, 5), memory)
        return
    layer = build(card, causal=pattern.online, kv_heads=2, output_gate=True)
    x, memory = tokens(2, 5), tokens(2, 7, seed=2)
    y = layer(x, memory) if pattern.cross else layer(x)
    source = memory if pattern.cross else x
    q = layer.q_proj(x).view(2, 5, HEADS, -1).transpose(1, 2)
    k, v = (p(source).view(2, -1, 2, 4).transpose(1, 2) for p in (layer.k_proj, layer.v_proj))
    given = {**card.cases[0].options, **layer.operands(x, source)}
    out = card.op(q=q, k=k, v=v, causal=pattern.causal, **given).transpose(1, 2).reshape(2, 5, DIM)
    expected = layer.o_proj(out * layer.g_proj(x).sigmoid())
    check_close(card, y, expected, "same")


def test_order_of_convolution_norm_and_positions():
    layer = build(regard.mechanisms["softmax"], causal=True, **FULL)
    x = tokens(1, 5)
    joined = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], 2)
    weight, line = layer.short_conv.weight, torch.zeros_like(joined)
    for t in range(5):
        for back in range(min(3, t + 1)):
            line[:, t] += weight[:, back] * joined[:, t - back]
    q, k, v = (part.view(1, 5, -1, 4).transpose(1, 2) for part in silu(line).split([16, 8, 8], 2))
    at = torch.arange(5)[None]
    q, k = rotate(layer.q_norm(q), at), rotate(layer.k_norm(k), at)
    out = regard.ops.softmax_attention(q, k, v, causal=True)
    out = out.transpose(1, 2).reshape(1, 5, DIM) * layer.g_proj(x).sigmoid()
    check_close(layer.card, layer(x), layer.o_proj(out), "same")


@pytest.mark.parametrize("card", CARDS, ids=by_name)
def test_every_parameter_learns(card):
    layer = build(card, causal=causal_of(card), **FULL)
    (layer(tokens(2, 6)) * tokens(2, 6, seed=3)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("card", having("key_mask"), ids=by_name)
def test_padding_is_as_if_it_were_not_there(card):
    layer = build(card, causal=causal_of(card), **FULL)
    real = [tokens(1, n, seed=n) for n in (6, 4, 3, 2)]
    masks = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0]]
    ).bool()
    x = torch.full((4, 6, DIM), torch.nan, dtype=torch.float64)
    for row, piece in enumerate(real):
        x[row, masks[row]] = piece[0]
    x.requires_grad_()
    y = layer(x, key_mask=masks)
    assert not y[~masks].any()
    y.square().sum().backward()
    assert not x.grad[~masks].any()
    padded = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    for row, piece in enumerate(real):
        piece.requires_grad_()
        alone = layer(piece)
        check_close(card, y[row, masks[row]], alone[0])
        alone.square().sum().backward()
        check_close(card, x.grad[row, masks[row]], piece.grad[0], "gradient")
    for name, parameter in layer.named_parameters():
        check_close(card, padded[name], parameter.grad, "gradient")


@pytest.mark.parametrize("card", having("cu_seqlens"), ids=by_name)
def test_packed_neighbours_do_not_meet(card):
    layer = build(card, causal=causal_of(card), **FULL)
    pieces = [tokens(1, n, seed=n) for n in (4, 1, 3)]
    offsets = torch.tensor([0, 4, 4, 5, 8], dtype=torch.int32)
    y = layer(torch.cat(pieces, 1), cu_seqlens=offsets)
    alone = [layer(piece) for piece in pieces]
    check_close(card, y, torch.cat(alone, 1))
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1]]).bool()
    if card.accepts("key_mask"):
        y = layer(torch.cat(pieces, 1), cu_seqlens=offsets, key_mask=mask)
        alone = [layer(pieces[0][:, [0, 2, 3]]), layer(pieces[1]), layer(pieces[2][:, 1:])]
        check_close(card, y[mask], torch.cat(alone, 1)[0])


def test_packed_cross():
    layer = build(regard.mechanisms["softmax"])
    x, memory = tokens(1, 5), tokens(1, 4, seed=2)
    offsets, offsets_k = (torch.tensor(o, dtype=torch.int32) for o in ([0, 2, 5], [0, 3, 4]))
    y = layer(x, memory, cu_seqlens=offsets, cu_seqlens_k=offsets_k)
    alone = [layer(x[:, :2], memory[:, :3]), layer(x[:, 2:], memory[:, 3:])]
    check_close(layer.card, y, torch.cat(alone, 1), "same")


@pytest.mark.parametrize(
    "card", having("key_mask", patterns=(Pattern.NONCAUSAL_CROSS,)), ids=by_name
)
def test_masked_memory_is_as_if_it_were_not_there(card):
    layer = build(card, qk_norm=True)
    x, memory = tokens(2, 5), tokens(2, 4, seed=2)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1]]).bool()
    junk = torch.where(mask[..., None], memory, torch.nan)
    y = layer(x, junk, key_mask=mask)
    check_close(card, y[:1], layer(x[:1], memory[:1, [0, 1, 3]]))
    check_close(card, y[1:], layer(x[1:], memory[1:, 3:]))
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("card", having(patterns=(Pattern.CAUSAL_SELF,)), ids=by_name)
def test_the_future_changes_no_bit(card):
    layer = build(card, torch.float32, causal=True, **FULL)
    x = tokens(1, 7, dtype=torch.float32)
    changed = x.clone()
    changed[:, 4:] = 1e4
    assert torch.equal(layer(x)[:, :4], layer(changed)[:, :4])


@pytest.mark.parametrize("card", CARDS, ids=by_name)
def test_bfloat16(card):
    settings = {"causal": causal_of(card), **FULL}
    layer = build(card, torch.bfloat16, **settings)
    x = tokens(2, 9, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    check_close(card, y, copy.deepcopy(layer).double()(x.double()), dtype=torch.bfloat16)


@pytest.mark.parametrize("card", CARDS, ids=by_name)
def test_autocast(card):
    layer = build(card, torch.float32, causal=causal_of(card), **FULL)
    x = tokens(2, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    check_close(card, y, copy.deepcopy(layer).double()(x.double()), dtype=torch.bfloat16)


@pytest.mark.parametrize("card", [card for card in CARDS if card is not TOY], ids=by_name)
def test_compiles_whole(card):
    torch._dynamo.reset()
    layer = build(card, torch.float32, causal=causal_of(card), **FULL)
    x, mask = tokens(2, 6, dtype=torch.float32), None
    if card.accepts("key_mask"):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, key_mask=mask), layer(x, key_mask=mask)
    check_close(card, y, expected, "same")
    wanted = torch.autograd.grad(expected.square().sum(), layer.q_proj.weight)[0]
    check_close(card, torch.autograd.grad(y.square().sum(), layer.q_proj.weight)[0], wanted, "same")
    torch._dynamo.reset()


@pytest.mark.parametrize("card", CARDS, ids=by_name)
def test_on_the_meta_device(card):
    settings = {"causal": causal_of(card), **FULL}
    with torch.device("meta"):
        layer = Attention(DIM, HEADS, mechanism=card, **settings)
        y = layer(torch.empty(2, 5, DIM))
    assert y.is_meta
    assert y.shape == (2, 5, DIM)
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(torch.randn(2, 5, DIM)).isfinite().all()


@pytest.mark.parametrize("card", CARDS, ids=by_name)
def test_state_dict_round_trip(card, tmp_path):
    settings = {"causal": causal_of(card), **FULL}
    layer = build(card, torch.float32, **settings)
    names = {f"{name}_proj.weight" for name in "qkvog"}
    names |= {"q_norm.weight", "k_norm.weight", "short_conv.weight"}
    for operand in card.operands:
        leaves = ("free",) if operand.source == "head" else ("weight", "bias")
        leaves = ("weight", "norm.weight") if is_probe(operand) else leaves
        names |= {f"operands.{operand.name}.{leaf}" for leaf in leaves}
    assert set(layer.state_dict()) == names
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = Attention(DIM, HEADS, mechanism=card, options=card.cases[0].options, **settings)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = tokens(1, 5, dtype=torch.float32)
    assert torch.equal(other(x), layer(x))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))


def test_a_plain_layer_has_four_matrices():
    assert set(Attention(DIM, HEADS).state_dict()) == {f"{n}_proj.weight" for n in "qkvo"}
    wide = Attention(DIM, 3, kv_heads=1, head_dim=6)
    assert wide.q_proj.weight.shape == (18, DIM)
    assert wide.k_proj.weight.shape == (6, DIM)
    assert wide(torch.randn(1, 2, DIM)).shape == (1, 2, DIM)


def test_options_reach_the_op():
    x = tokens(1, 6)
    layer = build(regard.mechanisms["softmax"], causal=True, options={"window": (0, 0)})
    check_close(layer.card, layer(x), layer.o_proj(layer.v_proj(x)), "same")


def test_dropout_is_on_the_output_and_in_training_only():
    layer = build(regard.mechanisms["softmax"], dropout=0.5)
    x = tokens(4, 8)
    dropped = layer(x)
    kept = dropped != 0
    assert 0.3 < kept.double().mean() < 0.7
    whole = layer.eval()(x)
    assert whole.all()
    check_close(layer.card, dropped[kept], 2 * whole[kept], "same")


def test_rope_makes_order_matter_and_its_base_too():
    softmax = regard.mechanisms["softmax"]
    x = tokens(1, 6)
    plain, turned, other = (build(softmax, rope=rope) for rope in (False, True, 100.0))
    order = [5, 1, 2, 3, 4, 0]
    check_close(softmax, plain(x[:, order])[:, order], plain(x), "same")
    assert not torch.allclose(turned(x[:, order])[:, order], turned(x), atol=1e-3)
    assert not torch.allclose(other(x), turned(x), atol=1e-4)
    assert "rope=100" in repr(other)


def test_empty_batches_and_sequences():
    layer = build(regard.mechanisms["softmax"], causal=True, **FULL)
    assert layer(tokens(0, 3)).shape == (0, 3, DIM)
    assert layer(tokens(2, 0)).shape == (2, 0, DIM)
    assert layer(tokens(2, 0), key_mask=torch.ones(2, 0).bool()).shape == (2, 0, DIM)
    masked = layer(tokens(1, 3), key_mask=torch.zeros(1, 3).bool())
    assert not masked.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 15}, "Attention: dim must be a multiple of heads, 4, where head_dim is not given"),
        ({"heads": 0}, "Attention: heads must be an int of at least 1, got 0"),
        ({"kv_heads": 3}, "Attention: heads must be a multiple of kv_heads, 3, got 4"),
        ({"causal": 1}, "Attention: causal must be True or False, got 1"),
        ({"rope": True, "head_dim": 3}, "Attention: rope must be False where head_dim is odd"),
        ({"rope": 0.5}, "Attention: rope must be a finite number above 1, got 0.5"),
        ({"short_conv": -1}, "Attention: short_conv must be an int of at least 0, got -1"),
        ({"dropout": 1.0}, "Attention: dropout must be a probability below 1, got 1.0"),
        ({"mechanism": 3}, "Attention: mechanism must be the name of a mechanism or a Card, got 3"),
        ({"mechanism": "softmx"}, "did you mean 'softmax'?"),
        ({"mechanism": TOY}, "Attention: causal must be True with mechanism 'toy', got False"),
        ({"mechanism": PLANNED}, "made from tokens or heads (it needs its own mixer), got operand"),
        ({"options": 3}, "Attention: options must be a mapping of the op's arguments, got 3"),
        ({"options": {"causal": True}}, "options must be without 'causal', which the layer gives"),
        ({"options": {"windw": (1, 1)}}, "got 'windw'; did you mean 'window'?"),
        ({"options": {"sinks": torch.zeros(4)}}, "options must be plain values, as a tensor"),
        (
            {"mechanism": TOY, "causal": True, "options": {"gate": 1}},
            "options must be without 'gate'",
        ),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises((TypeError, ValueError, KeyError)) as caught:
        Attention(**{"dim": DIM, "heads": HEADS, **settings})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({}, {"x": tokens(2, 3)[..., :4]}, "x must be of shape [batch, length, 16], got float64"),
        ({}, {"x": 3}, "Attention: x must be a torch.Tensor, got 3"),
        ({}, {"memory": tokens(3, 4)}, "memory must be of x's batch size 2 on cpu"),
        ({}, {"key_mask": torch.ones(2, 3)}, "key_mask must be a bool tensor"),
        ({}, {"key_mask": torch.ones(2, 4).bool()}, "key_mask must be of shape [2, 3]"),
        ({}, {"return_state": 1}, "return_state must be True or False, got 1"),
        ({}, {"state": 3}, "state must be None or a StateGroup, got int"),
        ({}, {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must be an int32 tensor"),
        (
            {},
            {"x": tokens(1, 3), **dict.fromkeys(("cu_seqlens", "cu_seqlens_k"), OFFSETS)},
            "cu_seqlens_k must be None without memory",
        ),
        ({"rope": True}, {"memory": tokens(2, 4)}, "memory must be None with rope"),
        ({"short_conv": 2}, {"memory": tokens(2, 4)}, "memory must be None with short_conv"),
        (
            {"mechanism": TOY, "causal": True},
            {"memory": tokens(2, 4)},
            "memory must be None with causal=True and mechanism 'toy', which serves causal_self",
        ),
        (
            {"mechanism": BARE},
            {"key_mask": torch.ones(2, 3).bool()},
            "key_mask must be left out with mechanism 'bare', whose op has no key_mask",
        ),
        ({"mechanism": BARE}, {"return_state": True}, "return_state must be left out with"),
    ],
)
def test_a_wrong_input_is_named(settings, call, message):
    layer = Attention(DIM, HEADS, **settings).double()
    with pytest.raises((TypeError, ValueError)) as caught:
        layer(**{"x": tokens(2, 3), **call})
    assert str(caught.value).startswith("Attention: ")
    assert message in str(caught.value)
