"""Sinks: by hand, on tiny models, and in MiniLM."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tiny_models as tiny
from lens.examples import padded_batch, tiny_bert, tiny_whisper
from regard.lens.maps import attention_maps
from regard.lens.reductions import Reduce
from regard.lens.sinks import (
    column_means,
    find_sinks,
    massive_activations,
    sink_dimensions,
    sinks,
)
from regard.lens.tap import tap

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return padded_batch()


def test_columns_and_sinks_by_hand() -> None:
    weights = torch.tensor([[1.0, 0, 0], [0.7, 0.3, 0], [0.6, 0.05, 0.35]])
    visible = torch.ones(3, 3, dtype=torch.bool).tril()
    means = column_means(weights, visible=visible)
    torch.testing.assert_close(means, torch.tensor([2.3 / 3, 0.175, 0.35]))
    assert find_sinks(weights, theta=0.2, visible=visible).tolist() == [True, False, True]
    # alpha / S = 0.5
    assert find_sinks(weights, theta=None, alpha=1.5, visible=visible).tolist() == [True, 0, 0]
    assert not find_sinks(weights, theta=1.1, visible=visible).any()
    with pytest.raises(ValueError, match="one number and one None"):
        find_sinks(weights, alpha=5.0)
    assert column_means(weights, visible=torch.zeros(3, 3, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_planted_dimensions_are_found() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, 9, 64)
    hidden[:, :, 0, [5, 40]] = 60.0
    hidden[0, 0, 0, 7] = 80.0  # in one layer and input only
    assert sorted(sink_dimensions(hidden)) == [5, 40]
    assert sink_dimensions(hidden, token=4) == []
    moved = torch.randn(4, 3, 9, 64)
    for row, token in enumerate((2, 8, 0)):
        moved[:, row, token, 11] = -60.0
    assert sink_dimensions(moved, token=torch.tensor([2, 8, 0])) == [11]
    massive = massive_activations(hidden[1], least=50, ratio=50)
    assert massive.nonzero()[:, 2].unique().tolist() == [5, 40]
    assert not massive_activations(hidden[1]).any()


def test_sinks_of_a_model_ignore_padding(bert, batch, tmp_path) -> None:
    found = sinks(bert, batch, theta=0.2)
    maps = attention_maps(bert, batch).weights
    np.testing.assert_allclose(found.received[:, 0], maps[:, 0].mean(-2), atol=1e-6)
    np.testing.assert_allclose(
        found.received[:, 1, :, :4], maps[:, 1, :, :4, :4].mean(-2), atol=1e-6
    )
    assert (found.received[:, 1, :, 4:] == 0).all()
    assert not found.sink[:, 1, :, 4:].any()
    one = {name: values[1:, :4] for name, values in batch.items()}
    np.testing.assert_allclose(
        sinks(bert, one, theta=0.2).received, found.received[:, 1:, :, :4], atol=1e-5
    )
    mass = maps * found.sink[:, :, :, None]
    rows = np.stack([mass[:, 0].sum(-1).sum(-1), mass[:, 1, :, :4].sum(-1).sum(-1)]).sum(0) / 11
    np.testing.assert_allclose(found.mass, rows, atol=1e-5)
    assert not sinks(bert, batch, theta=0.0, spare_first=True).sink[..., 0].any()
    found.picture(tmp_path / "sinks.png")
    assert len(json.loads(found.to_json())["names"]) == 3


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_sinks_of_a_decoder(kind: str) -> None:
    model = tiny.decoder(kind, "sdpa")
    ids = torch.randint(1, 31, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0  # on the left
    both = sinks(model, {"input_ids": ids, "attention_mask": mask}, theta=0.3)
    alone = sinks(model, {"input_ids": ids[1:, 2:]}, theta=0.3)
    np.testing.assert_allclose(both.received[:, 1:, :, 2:], alone.received, atol=1e-5)
    assert (both.received[:, 1, :, :2] == 0).all()
    # The last key is seen by one query only: its mean is that one weight.
    maps = attention_maps(model, {"input_ids": ids[:1]}).weights
    np.testing.assert_allclose(both.received[:, 0, :, -1], maps[:, 0, :, -1, -1], atol=1e-6)
    assert np.isfinite(both.largest).all()
    summed = Reduce()
    with tap(model, read=summed), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    streamed = np.stack([part.received for part in summed.result()])
    np.testing.assert_allclose(both.received, streamed, atol=1e-6)


def test_sinks_of_cross_attention() -> None:
    model, (spectrogram, tokens) = tiny_whisper()
    inputs = {"input_features": spectrogram, "decoder_input_ids": tokens}
    found = sinks(model, inputs, kind="cross", theta=0.2)
    assert found.received.shape == (3, 1, 2, 20)
    assert np.isnan(found.largest).all()  # activations are of the decoder, sinks of the encoder
    assert found.dimensions == ()
    with pytest.raises(ValueError, match="layers of one size"):
        sinks(model, inputs)


@pytest.mark.slow
@pytest.mark.requires("resource:minilm")
def test_minilm_has_sinks() -> None:
    from regard.testing import resources

    model, tokenizer = resources.minilm()
    inputs = tokenizer(["The cat sat on the mat, and then it slept."], return_tensors="pt")
    found = sinks(model, dict(inputs), alpha=3.0, theta=None)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    heaviest = {tokens[i] for i in found.received[:, 0].mean(1).argmax(-1)}
    assert heaviest & {"[CLS]", "[SEP]", "."}
    assert found.mass.max() > 0.5
