"""Attention transfer in models of transformers: by the maps that a swap attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_models as tiny
from adapt.transformers.models_and_inputs import case, output
from lens.timm_like import VisionTransformer
from regard.adapt import timm
from regard.adapt import transformers as adapt
from regard.recipes.distil import diagnose, distil_attention, transferring


@pytest.mark.parametrize(
    ("kind", "mechanism", "layers"),
    [
        ("Llama", "hedgehog", None),
        ("Llama", "hedgehog_window", None),
        ("bert", "hedgehog", None),
        ("whisper", "hedgehog", "*.self_attn"),
        ("whisper", "hedgehog", "*.encoder_attn"),
        ("whisper", "hedgehog_window", "*.decoder.*.self_attn"),
    ],
)
def test_the_next_layer_sees_the_teacher(kind: str, mechanism: str, layers: str | None) -> None:
    model, inputs = case(kind, "left")
    before = output(model, inputs)
    options = {"window_length": 3} if mechanism == "hedgehog_window" else {}
    done = adapt.swap(model, mechanism, layers, **options)
    seen: dict[str, Any] = {}
    with transferring(model, seen.__setitem__) as found:
        beside = output(model, inputs, **({} if kind == "bert" else {"use_cache": False}))
    assert tuple(found) == tuple(seen) == done.layers
    assert (beside - before).abs().max() < 1e-5
    for one in seen.values():
        rows = one.student_weights.sum(-1)
        real = one.query_mask[:, None].expand_as(rows) if one.query_mask is not None else rows > 0
        torch.testing.assert_close(rows[real], torch.ones_like(rows[real]))
    done.restore()
    assert torch.equal(output(model, inputs), before)


def test_maps_learn_their_teachers() -> None:
    model, inputs = case("Llama", "left")
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    adapt.swap(model, "hedgehog")
    before = diagnose(model, inputs)
    losses = distil_attention(model, [inputs] * 25)
    after = diagnose(model, inputs)
    assert losses[-1] < losses[0]
    for name, measures in after.items():
        assert measures["kl"] < before[name]["kl"]
    for name, value in model.state_dict().items():
        assert ".regard." in name or torch.equal(value, weights[name])
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_models_of_timms_layout() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2}
    model = VisionTransformer(**sizes, num_heads=2, num_classes=5).eval()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    done = timm.swap(model, "hedgehog")
    with torch.no_grad(), transferring(model, lambda name, both: None) as found:
        torch.testing.assert_close(model(images), before, atol=1e-5, rtol=0)
    assert tuple(found) == done.layers
    losses = distil_attention(model, [images] * 5)
    assert losses[-1] < losses[0]


def test_caches_are_refused_during_the_transfer() -> None:
    model = tiny.decoder("Llama")
    adapt.swap(model, "hedgehog")
    with (
        pytest.raises(ValueError, match="use_cache=False"),
        transferring(model, lambda name, both: None),
    ):
        model(torch.tensor([[1, 2]]), use_cache=True)
