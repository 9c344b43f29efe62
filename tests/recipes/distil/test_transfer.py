"""Conversion, attention transfer and low-rank finetuning of small decoders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regard.mixers import Attention, Hedgehog
from regard.models import Decoder, DecoderConfig, MixerConfig, generate
from regard.recipes import Optimiser
from regard.recipes.distil import (
    LowRank,
    adaptable,
    add_lora,
    batch_loss,
    both,
    convert,
    diagnose,
    distil_attention,
    finetune,
    from_attention,
    merge_lora,
    output_error,
    transferring,
    weight_cross_entropy,
)
from regard.recipes.distil.transfer import converted

VOCABULARY = 13
SOFTMAX = {"heads": 4, "kv_heads": 2, "rope": True}


def decoder(layers: int = 2, **settings) -> Decoder:
    torch.manual_seed(0)
    mixer = MixerConfig("attention", {**SOFTMAX, **settings})
    config = DecoderConfig(
        (mixer,), vocabulary=VOCABULARY, dim=32, layers=layers, mlp_dim=40, init_std=0.3
    )
    return Decoder(config)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, memory=None, key_mask=None):
        return self.layer(x, memory, key_mask=key_mask)


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": True, "output_gate": True, "short_conv": 3}, {"kv_heads": 4}]
)
def test_during_the_transfer_the_model_is_what_it_was(window, settings):
    model = decoder(**settings)
    tokens, mask = ids(3, 12), torch.ones(3, 12, dtype=torch.bool)
    mask[0, :5] = mask[1, 9:] = False
    before = model(tokens, key_mask=mask)
    names = convert(model, window_length=window)
    assert names == ["layers.0.mixer", "layers.1.mixer"]
    seen = []
    with transferring(model, lambda name, _: seen.append(name)):
        assert torch.equal(model(tokens, key_mask=mask), before)
    assert seen == names
    assert not torch.equal(model(tokens, key_mask=mask), before)


def test_only_maps_and_window_factors_have_gradients():
    model = decoder()
    convert(model, window_length=4)
    free = set(adaptable(model))
    assert free == {
        f"layers.{i}.mixer.{name}"
        for i in range(2)
        for name in ("feature_map_q.mlp.layer", "feature_map_k.mlp.layer", "window_factors")
    }
    before = copy.deepcopy(model.state_dict())
    found: dict[str, bool] = {}
    forward = model.forward

    def watched(*given, **named):
        found.update({n: p.requires_grad for n, p in model.named_parameters()})
        return forward(*given, **named)

    model.forward = watched
    losses = distil_attention(model, [ids(4, 16)] * 8, steps=8)
    assert {name for name, wanted in found.items() if wanted} == free
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in free), name
    assert all(p.requires_grad for p in model.parameters())


def test_the_gradients_of_all_others_are_none():
    model = decoder()
    convert(model)
    model.requires_grad_(False)
    for parameter in adaptable(model).values():
        parameter.requires_grad_()
    batch_loss(model, ids(2, 10))[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in adaptable(model)), name


def test_losses_are_those_of_each_layer_on_true_inputs():
    model = decoder()
    tokens, mask = ids(3, 12), torch.ones(3, 12, dtype=torch.bool)
    mask[0, 8:] = False
    convert(model, window_length=3)
    seen = {}
    with transferring(model, seen.__setitem__):
        model(tokens, key_mask=mask)
    total, losses = batch_loss(model, {"tokens": tokens, "key_mask": mask}, mse=10.0)
    expected = []
    for name, pair in seen.items():
        assert torch.equal(pair.query_mask, mask)
        xent = weight_cross_entropy(pair.student_weights, pair.teacher_weights, mask)
        mse = output_error(pair.student, pair.teacher, mask)
        torch.testing.assert_close(losses[name].xent, xent)
        torch.testing.assert_close(losses[name].mse, mse)
        expected.append(xent + 10 * mse)
    torch.testing.assert_close(total, torch.stack(expected).mean())
    only, parts = batch_loss(model, {"tokens": tokens, "key_mask": mask}, xent=0.0, mse=10.0)
    assert all(part.xent is None for part in parts.values())
    mean = sum(10 * loss.mse for loss in losses.values()) / 2
    torch.testing.assert_close(only, mean, rtol=1e-4, atol=1e-6)  # the op itself, not its weights


def test_padding_does_not_change_the_losses():
    model = decoder()
    convert(model)
    tokens = ids(2, 9)
    alone, _ = batch_loss(model, tokens)
    for side in ("left", "right"):
        pad = ids(2, 4, seed=3)
        pieces = [pad, tokens] if side == "left" else [tokens, pad]
        places = torch.arange(13)[None].expand(2, -1)
        mask = places >= 4 if side == "left" else places < 9
        padded, _ = batch_loss(model, {"tokens": torch.cat(pieces, 1), "key_mask": mask})
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_cross_and_noncausal_attention_are_transferred_too():
    torch.manual_seed(0)
    for memory in (None, torch.randn(2, 7, 16)):
        teacher = Attention(16, 4)
        x = torch.randn(2, 5, 16)
        layer = from_attention(teacher)
        model = Around(layer)
        length = x.shape[1] if memory is None else 7
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, 3:] = False
        seen = {}
        with transferring(model, seen.__setitem__):
            y = model(x, memory, mask)
        assert torch.equal(y, teacher(x, memory, key_mask=mask))
        assert (seen["layer"].query_mask is None) == (memory is not None)
        arguments = {"x": x, "memory": memory, "key_mask": mask}
        losses = distil_attention(model, [arguments] * 30, steps=30)
        assert losses[-1] < 0.9 * losses[0]


def test_any_q_k_and_v_will_do():
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    pair = both(q, k, v, causal=True)
    linear = both(q, k, v, causal=True, weights=False)
    torch.testing.assert_close(pair.student, linear.student, rtol=1e-4, atol=1e-5)
    assert torch.equal(pair.teacher, linear.teacher)
    torch.testing.assert_close(
        pair.teacher_weights @ v.repeat_interleave(2, 1), pair.teacher, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="teacher_options must be of scale only"):
        both(q, k, v, teacher_options={"window": (2, 0)})


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "short_conv": 2}])
def test_converted_saved_read_and_generating(tmp_path, window, settings):
    model = decoder(layers=3, **settings)
    options = {"tie": True} if window is None else None
    convert(model, window_length=window, keep=[1], feature_options=options)
    kinds = [type(block.mixer) for block in model.layers]
    assert kinds == [Hedgehog, Attention, Hedgehog]
    assert [model.config.mixer(i).kind for i in range(3)] == ["hedgehog", "attention", "hedgehog"]
    distil_attention(model, [ids(4, 16)] * 3, steps=3)
    model.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    tokens = ids(2, 9)
    assert torch.equal(again(tokens), model(tokens))
    made = generate(again, tokens, 6)
    logits = again(torch.cat([tokens, made], 1))
    assert torch.equal(logits[:, 8:-1].argmax(-1), made)


def test_low_rank_changes_merge():
    model = decoder()
    convert(model)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    names = add_lora(model, rank=3, alpha=6)
    assert names == [f"layers.{i}.mixer.{n}_proj" for i in range(2) for n in "qkvo"]
    low_rank = model.layers[0].mixer.q_proj
    assert isinstance(low_rank, LowRank)
    assert set(low_rank.state_dict()) == {
        "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"
    }  # fmt: skip
    losses = finetune(model, [ids(4, 16)] * 30, model.loss, steps=30, optimiser=Optimiser(5e-3))
    assert losses[-1] < losses[0]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in dict(model.named_parameters()) if "lora" in n} | set(
        adaptable(model)
    )
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert torch.equal(parameter, frozen[name.replace("base_layer.", "")]), name
    before = model(ids(2, 9))
    assert merge_lora(model) == names
    assert type(model.layers[0].mixer.q_proj) is nn.Linear
    torch.testing.assert_close(model(ids(2, 9)), before, rtol=1e-5, atol=1e-5)


def test_diagnosis_of_an_untouched_teacher():
    model = decoder()
    convert(model, window_length=16)  # longer than the sequence: the student is the teacher
    found = diagnose(model, ids(2, 16))
    for measures in found.values():
        assert abs(measures["kl"]) < 1e-5
        assert measures["monotonicity"] > 0.999
        assert measures["top_agreement"] == 1.0
        assert abs(measures["entropy"] - measures["teacher_entropy"]) < 1e-5
    convert(model := decoder())
    linear = diagnose(model, ids(2, 16))["layers.0.mixer"]
    assert linear["kl"] > 0.1
    assert linear["entropy"] > linear["teacher_entropy"]


def test_what_cannot_be_done_is_said():
    model = decoder()
    with pytest.raises(ValueError, match="keep must be one of 'layers"):
        convert(model, keep=["layers.0"])
    with pytest.raises(ValueError, match="keep must be below 2"):
        convert(model, keep=[2])
    with pytest.raises(ValueError, match="model must be one with converted layers"):
        batch_loss(model, ids(1, 4))
    with pytest.raises(ValueError, match="model must be one with feature maps"):
        distil_attention(model, [ids(1, 4)])
    convert(model)
    assert list(converted(model)) == ["layers.0.mixer", "layers.1.mixer"]
    with pytest.raises(ValueError, match="model must be one with softmax layers"):
        convert(model)
    with pytest.raises(ValueError, match="batches must be at least 3 of them, got 2"):
        distil_attention(model, [ids(1, 9)] * 2, steps=3)
    left_out = pytest.raises(ValueError, match="return_state must be left out during")
    with transferring(model, lambda *_: None), left_out:
        model(ids(1, 4), return_state=True)
    assert model.layers[0].mixer.card.op.__name__ == "hedgehog_attention"
    with pytest.raises(ValueError, match="model must be one with linear layers named"):
        add_lora(nn.Linear(3, 3))
