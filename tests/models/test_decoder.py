"""The decoder, with every mixer."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch.nn.functional import cross_entropy, silu

import regard
from models.subjects import DIM, MIXERS, VOCABULARY, check_close, config_of, decoder, ids
from regard.core.budgets import budget, relative_error
from regard.models import Decoder, DecoderConfig, MixerConfig

NAMES = list(MIXERS)
HYBRID = ("mesa", "softmax")
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()


def test_is_what_the_formula_says():
    model, tokens = decoder("softmax", "mesa"), ids(2, 5)
    x = model.embed.weight[tokens]
    for block in model.layers:
        x = x + block.mixer(block.mixer_norm(x))
        y, mlp = block.mlp_norm(x), block.mlp
        gated = silu(y @ mlp.gate_proj.weight.mT) * (y @ mlp.up_proj.weight.mT)
        x = x + gated @ mlp.down_proj.weight.mT
    check_close(model(tokens), model.norm(x) @ model.head.weight.mT, "same")


def test_the_config_says_which_layer_mixes_how():
    model = decoder(*HYBRID, layers=5)
    kinds = [type(block.mixer).__name__ for block in model.layers]
    assert kinds == ["Mesa", "Attention", "Mesa", "Attention", "Mesa"]
    assert all(block.mixer.causal for block in model.layers)


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), HYBRID], ids=" ".join)
def test_prefill_and_steps_equal_at_once(names):
    model, tokens = decoder(*names), ids(2, 8)
    with torch.no_grad():
        expected = model(tokens)
        outputs, state = [], None
        for piece in tokens.split([5, 1, 1, 1], 1):
            logits, state = model(piece, state=state, return_state=True)
            outputs.append(logits)
        check_close(torch.cat(outputs, 1), expected)
        assert state.length == 8


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), HYBRID], ids=" ".join)
def test_padding_is_as_if_it_were_not_there(names):
    """On either side, whatever id it has, and in the tokens that follow."""
    model = decoder(*names)
    rows = [ids(1, int(mask.sum()), seed=row) for row, mask in enumerate(PADDED)]
    tokens = torch.full(PADDED.shape, -7)
    for row, real in enumerate(rows):
        tokens[row, PADDED[row]] = real[0]
    new = ids(3, 1, seed=9)
    with torch.no_grad():
        logits, state = model(tokens, key_mask=PADDED, return_state=True)
        after = model(new, state=state)
        for row, real in enumerate(rows[:2] if "window" in names else rows):
            alone = model(torch.cat([real, new[row : row + 1]], 1))[0]
            check_close(torch.cat([logits[row, PADDED[row]], after[row]]), alone)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_do_not_meet(name):
    model, tokens = decoder(name), ids(1, 7)
    if not all(block.mixer.card.accepts("cu_seqlens") for block in model.layers):
        return
    offsets = torch.tensor([0, 4, 7], dtype=torch.int32)
    pieces = tokens.split([4, 3], 1)
    with torch.no_grad():
        alone = torch.cat([model(piece) for piece in pieces], 1)
        check_close(model(tokens, cu_seqlens=offsets), alone)
        losses = [model.loss(piece) * (piece.shape[1] - 1) for piece in pieces]
        check_close(model.loss(tokens, cu_seqlens=offsets), sum(losses) / 5)


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), HYBRID], ids=" ".join)
def test_the_future_changes_no_bit(names):
    model, tokens = decoder(*names, dtype=torch.float32), ids(1, 7)
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCABULARY
    assert torch.equal(model(tokens)[:, :4], model(changed)[:, :4])
    assert not torch.equal(model(tokens)[:, 4:], model(changed)[:, 4:])


# -- the loss -----------------------------------------------------------------------------------


def test_loss_is_cross_entropy_of_the_next_token():
    model, tokens = decoder("parallax"), ids(3, 6)
    logits = model(tokens)[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    check_close(model.loss(tokens), expected, "same")
    labels = tokens.clone()
    labels[:, :4] = -100
    expected = cross_entropy(logits[:, 3:].flatten(0, 1), tokens[:, 4:].flatten())
    check_close(model.loss(tokens, labels), expected, "same")
    assert model.loss(tokens, torch.full_like(tokens, -100)) == 0
    assert model.loss(tokens[:, :1]) == 0


def test_loss_of_padded_rows():
    model, tokens = decoder("mesa"), ids(3, 6)
    rows = [tokens[row, PADDED[row]][None] for row in range(3)]
    total = sum(model.loss(row) * (row.shape[1] - 1) for row in rows)
    count = sum(row.shape[1] - 1 for row in rows)
    junk = torch.where(PADDED, tokens, -100)
    check_close(model.loss(junk, key_mask=PADDED), total / count)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    model = decoder(name)
    model.loss(ids(2, 8)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize(
    "name",
    ["parallax", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "parallax")],
)
def test_learns_a_text_by_heart(name):
    torch.manual_seed(0)
    model = Decoder(config_of(name, dim=32, init_std=0.1))
    tokens = ids(2, 12)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        loss = model.loss(tokens)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(model.loss(tokens).detach()) < 0.2  # log 23 = 3.1 at first
    made = regard.models.generate(model, tokens[:, :3], 9)
    assert (made == tokens[:, 3:]).double().mean() > 0.9


# -- how it starts -------------------------------------------------------------------------------


def test_initial_values():
    torch.manual_seed(0)
    model = Decoder(config_of(*HYBRID, "local_linear", layers=3, dim=64, init_std=0.02))
    for name in ("embed", "head", "layers.0.mixer.short_conv", "layers.0.mixer.operands.beta"):
        weight = model.get_submodule(name).weight
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
    for name, parameter in model.named_parameters():
        assert "norm" not in name or bool((parameter == 1).all()), name
    assert model.layers[0].mixer.learned()["ridge"].unique().tolist() == [1.0]
    assert not model.layers[0].mixer.operands["log_decay"].bias.any()
    assert bool((model.layers[2].mixer.operands["log_decay"].bias == 3).all())


def test_from_the_meta_device():
    with torch.device("meta"):
        model = Decoder(config_of("mesa", "parallax"))
        assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, VOCABULARY)
    model = model.to_empty(device="cpu")
    other = Decoder(config_of("mesa", "parallax"))
    for each in (model, other):
        torch.manual_seed(3)
        each.reset_parameters()
    assert torch.equal(model(ids(2, 5)), other(ids(2, 5)))


def test_a_tied_head_is_the_embedding():
    model = decoder("softmax", tied=True)
    assert "head.weight" not in model.state_dict()
    x, _ = model.features(ids(1, 4))
    check_close(model(ids(1, 4)), x @ model.embed.weight.mT, "same")


# -- dtypes, compilation ---------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("parallax",), HYBRID], ids=" ".join)
def test_bfloat16_and_autocast(names):
    settings = {"init_std": 0.1}  # several layers: more rounding than the budget of one op
    tokens = ids(2, 9)
    model = decoder(*names, dtype=torch.float32, **settings)
    expected = copy.deepcopy(model).double()(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens)
        assert model.loss(tokens).dtype == torch.float32
    half = copy.deepcopy(model).bfloat16()
    assert found.dtype == half(tokens).dtype == torch.bfloat16
    assert half.loss(tokens).dtype == torch.float32
    assert relative_error(found, expected) < 2 * budget(torch.bfloat16)
    wide = copy.deepcopy(half).double()(tokens)
    assert relative_error(half(tokens), wide) < 2 * budget(torch.bfloat16)


@pytest.mark.slow
def test_compiles_whole():
    torch._dynamo.reset()
    model, tokens = decoder("mesa", "parallax", dtype=torch.float32), ids(2, 6)
    mask = PADDED[:2]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_close(compiled(tokens, key_mask=mask)[mask], model(tokens, key_mask=mask)[mask], "same")
    torch._dynamo.reset()


# -- the state -------------------------------------------------------------------------------------


def test_what_a_state_can_do(tmp_path):
    model, tokens = decoder(*HYBRID), ids(2, 6)
    with torch.no_grad():
        _, state = model(tokens[:, :5], return_state=True)
        expected = model(tokens[:, 5:], state=state.fork())
        order = torch.tensor([1, 0, 1])
        chosen = model(tokens[order, 5:], state=state.select(order))
        check_close(chosen, expected[order], "same")
        state.save(tmp_path / "state.safetensors")
        for again in (
            regard.load_state(tmp_path / "state.safetensors"),
            pickle.loads(pickle.dumps(state)),
        ):
            assert torch.equal(model(tokens[:, 5:], state=again), expected)
        with pytest.raises(ValueError, match=r"crop\(3\) needs the past"):
            state.crop(3)
        model = decoder("parallax")
        _, state = model(tokens[:, :5], return_state=True)
        check_close(model(tokens[:, 3:], state=state.crop(3)), model(tokens)[:, 3:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"tokens": ids(2, 3).double()}, "Decoder: tokens must be an int64 or int32 tensor"),
        ({"tokens": ids(3)}, "Decoder: tokens must be an int64 or int32 tensor [batch, length]"),
        ({"key_mask": torch.ones(2, 3)}, "Decoder: key_mask must be a bool tensor"),
        ({"key_mask": torch.ones(2, 4).bool()}, "Decoder: key_mask must be of shape [2, 3]"),
        ({"return_state": 1}, "Decoder: return_state must be True or False, got 1"),
        ({"state": 3}, "Decoder: state must be None or a StateGroup, got int"),
        ({"labels": ids(2, 4)}, "Decoder: labels must be of tokens' shape [2, 3]"),
    ],
)
def test_a_wrong_input_is_named(call, message):
    model, given = decoder("softmax"), {"tokens": ids(2, 3), **call}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        (model.loss if "labels" in call else model)(**given)


def test_a_state_of_another_model_is_refused():
    tokens = ids(2, 3)
    _, state = decoder("softmax", layers=3)(tokens, return_state=True)
    with pytest.raises(ValueError, match="state must be of a decoder with 2 layers"):
        decoder("softmax")(tokens, state=state)
    with pytest.raises(ValueError, match="state must be of a decoder with 2 layers"):
        decoder("softmax")(tokens, state=state["layer0"])


# -- the config ------------------------------------------------------------------------------------


def test_widths_of_the_gated_unit():
    mixers = (MixerConfig("attention", {"heads": 2}),)
    assert [DecoderConfig(mixers, dim=dim).hidden for dim in (2048, 96, 97)] == [5632, 256, 512]
    assert DecoderConfig(mixers, mlp_dim=100).hidden == 100
    assert Decoder(config_of("softmax")).layers[0].mlp.up_proj.weight.shape == (24, DIM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixers": ()}, "DecoderConfig: mixers must be 1 to 24 (the layers) of MixerConfig"),
        ({"mixers": ("mesa",)}, "DecoderConfig: mixers must be 1 to 24"),
        ({"layers": 0}, "DecoderConfig: layers must be an int of at least 1, got 0"),
        ({"mlp_dim": 0}, "DecoderConfig: mlp_dim must be an int of at least 1, got 0"),
        ({"tied": 1}, "DecoderConfig: tied must be True or False, got 1"),
    ],
)
def test_a_wrong_config_is_named(settings, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        DecoderConfig(**{"mixers": (MixerConfig(),), **settings})


def test_a_wrong_mixer_is_named():
    with pytest.raises(ValueError, match="kind must be one of .* did you mean 'parallax'"):
        MixerConfig("paralax")
    with pytest.raises(ValueError, match="MixerConfig: options must be without 'causal'"):
        MixerConfig("mesa", {"causal": False})
    with pytest.raises(TypeError, match="MixerConfig: options must be a mapping"):
        MixerConfig("mesa", 3)
    with pytest.raises(TypeError, match="windw"):
        Decoder(DecoderConfig((MixerConfig("mesa", {"heads": 2, "windw": 3}),), dim=8, layers=1))
