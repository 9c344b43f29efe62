"""Attention maps and rollout: by hand, and on tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models as tiny
from lens.examples import padded_batch, tiny_bert, tiny_whisper
from regard.lens.maps import attention_maps, rollout
from regard.mixers import Attention as Layer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return padded_batch()


def test_maps_are_the_models_own(bert, batch, tmp_path) -> None:
    found = attention_maps(bert, batch)
    bert.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = torch.stack(bert(**batch, output_attentions=True).attentions)
    bert.set_attn_implementation("sdpa")
    np.testing.assert_allclose(found.weights, wanted.numpy(), atol=1e-6)
    assert found.layers == (0, 1, 2)
    assert attention_maps(bert, batch, layers=[2]).weights.shape == (1, 2, 2, 7, 7)
    found.picture(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").is_file()
    assert json.loads(found.to_json())["layers"] == [0, 1, 2]
    with pytest.raises(ValueError, match="layers"):
        attention_maps(bert, batch, layers=[3])


def test_rollout_by_hand(tmp_path) -> None:
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    second = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    weights = torch.stack([first, second])[:, None, None]
    mixed = [(torch.eye(2) + w) / 2 for w in (first, second)]
    found = rollout(weights)
    np.testing.assert_allclose(found.shares[0], (mixed[1] @ mixed[0]).numpy())
    np.testing.assert_allclose(found.shares.sum(-1), 1)
    np.testing.assert_allclose(rollout(weights, keep=1).shares[0], np.eye(2))
    np.testing.assert_allclose(rollout(weights, keep=0).shares[0], (second @ first).numpy())
    # Without the smaller weight of each row, row 1 of the first layer keeps one of two equals.
    sharp = rollout(weights[:1], keep=0, discard=0.5).shares[0]
    assert sorted(sharp.max(-1)) == [1.0, 1.0]
    found.picture(tmp_path / "rollout.png")
    assert (tmp_path / "rollout.png").stat().st_size > 1000
    assert json.loads(found.to_json())["shares"]
    with pytest.raises(ValueError, match="between 0 and 1"):
        rollout(weights, keep=2)
    with pytest.raises(ValueError, match="self-attention"):
        rollout(torch.zeros(1, 1, 1, 2, 3))


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_rollout_of_a_model_sums_to_one(bert, batch, heads: str) -> None:
    maps = attention_maps(bert, batch).weights
    shares = rollout(torch.from_numpy(maps), heads=heads).shares
    np.testing.assert_allclose(shares.sum(-1), 1)
    assert (shares[1, :4, 4:] == 0).all()  # nothing arrives from padding


def test_a_tower_is_chosen_by_its_path() -> None:
    model, (spectrogram, tokens) = tiny_whisper()
    inputs = {"input_features": spectrogram, "decoder_input_ids": tokens}
    with pytest.raises(ValueError, match="choose with layers, kind or where"):
        attention_maps(model, inputs)
    found = attention_maps(model, inputs, where="encoder")
    assert found.weights.shape == (2, 1, 2, 20, 20)
    assert all(name.startswith("model.encoder.layers.") for name in found.names)
    found = attention_maps(model, inputs, where="decoder")
    assert (np.triu(found.weights, 1) == 0).all()
    assert attention_maps(model, inputs, kind="cross").weights.shape == (3, 1, 2, 5, 20)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_grouped_heads_and_padding_on_the_left(kind: str) -> None:
    model = tiny.decoder(kind, "sdpa")
    ids = torch.randint(1, 31, (1, 6))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    inputs = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    alone = attention_maps(model, {"input_ids": ids}).weights
    inside = attention_maps(model, inputs).weights
    assert alone.shape == (3, 1, 4, 6, 6)
    np.testing.assert_allclose(inside[..., 2:, 2:], alone, atol=1e-5)
    assert (inside[..., 2:, :2] == 0).all()
    shares = rollout(torch.from_numpy(inside)).shares
    np.testing.assert_allclose(
        shares[:, 2:, 2:], rollout(torch.from_numpy(alone)).shares, atol=1e-5
    )


def test_our_own_layers() -> None:
    model = nn.Sequential(Layer(8, 2, causal=True), Layer(8, 2, causal=True))
    found = attention_maps(model, torch.randn(3, 5, 8))
    assert found.weights.shape == (2, 3, 2, 5, 5)
    assert found.names == ("0", "1")
    with pytest.raises(ValueError, match="no layer of attention"):
        attention_maps(nn.Linear(2, 2), torch.randn(1, 2))
