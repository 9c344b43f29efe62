"""Cross-attention, its agreement with saliency, and what stays as it was: tiny Whisper and BART."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden_files import parts
from lens.examples import WHISPER, tiny_whisper
from regard.lens.agreement import agreement, correlate, normalise_map, pool_saliency
from regard.lens.cross_attention import (
    aggregate,
    cross_attention,
    cross_attention_maps,
    value_weighted,
)
from regard.lens.forced import ForcedDecoding, encoder_output_saliency, input_saliency
from regard.lens.gradients import gradient_saliency
from regard.lens.occlusion import occlusion_saliency
from regard.lens.occlusion_masks import random_masks

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    return parts(WHISPER)


@pytest.fixture(scope="module")
def whisper():
    return tiny_whisper()[0]


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    return tiny_whisper()[1]


def close(found, wanted: Tensor, tolerance: float = 1e-5) -> None:
    found = torch.as_tensor(found)
    torch.testing.assert_close(found.to(wanted), wanted, atol=tolerance, rtol=0)


def test_maps_and_correlations_of_the_equations(golden, whisper, inputs) -> None:
    given, wanted = golden["in"], golden["out"]
    attention = cross_attention_maps(whisper, *inputs)
    close(attention, wanted["cross_attention"])
    close(aggregate(attention), wanted["ca_all"])
    close(torch.stack([aggregate(attention, [i]) for i in range(3)]), wanted["ca_layer_mean"])
    forced = ForcedDecoding(whisper, *inputs)
    with torch.no_grad():
        clean = forced.decode(forced.encode(forced.inputs))[0]
    close(clean.exp(), wanted["probs"])
    memory = encoder_output_saliency(whisper, *inputs, given["encoder_masks"])
    close(memory.values, wanted["SM_H"])
    spectrogram = input_saliency(whisper, *inputs, given["input_masks"], batch_size=7)
    close(spectrogram.values, wanted["SM_X"])
    pooled = pool_saliency(torch.from_numpy(spectrogram.values), 20)
    close(pooled, wanted["SM_X_pooled"])
    with_input = agreement(attention, pooled)
    with_memory = agreement(attention, torch.from_numpy(memory.values))
    close(with_input.all, wanted["pearson_all_X"])
    close(with_memory.all, wanted["pearson_all_H"])
    close(with_memory.layer, wanted["pearson_layer_H"])
    close(with_input.head, wanted["pearson_head_X"])


def test_rows_sum_to_one_before_and_after_means(whisper, inputs) -> None:
    found = cross_attention(whisper, *inputs)
    attention, values = torch.from_numpy(found.weights), torch.from_numpy(found.values)
    assert torch.equal(attention, cross_attention_maps(whisper, *inputs))
    assert values.shape == (3, 2, 20, 12)
    for maps in (
        attention,
        aggregate(attention),
        aggregate(attention, [1, 2], [0]),
        aggregate(attention, pairs=[(0, 1), (2, 0)]),
        value_weighted(attention, values),
    ):
        close(maps.sum(-1), torch.ones(maps.shape[:-1]))


def test_the_model_is_left_as_it_was(whisper, inputs) -> None:
    features, tokens = inputs
    with torch.no_grad():
        before = whisper(input_features=features, decoder_input_ids=tokens).logits
        cross_attention_maps(whisper, features, tokens)
        gradient_saliency(whisper, features, tokens, method="gradient")
        after = whisper(input_features=features, decoder_input_ids=tokens).logits
    assert torch.equal(before, after)
    assert whisper.config._attn_implementation == "sdpa"
    assert whisper.model.decoder.layers[0].fc1.weight.requires_grad
    assert whisper.model.decoder.layers[0].fc1.weight.grad is None


def test_a_picture_and_json(whisper, inputs, tmp_path) -> None:
    found = cross_attention(whisper, *inputs)
    found.picture(tmp_path / "cross.png")
    assert (tmp_path / "cross.png").stat().st_size > 1000
    told = json.loads(found.to_json())
    assert told["layers"] == [0, 1, 2]
    assert np.shape(told["weights"]) == (3, 2, 5, 20)


def test_text_to_text() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    ids, tokens = torch.tensor([[5, 9, 11, 7]]), torch.tensor([[1, 4, 8]])
    attention = cross_attention_maps(model, ids, tokens)
    assert attention.shape == (2, 2, 3, 4)
    masks = random_masks(8, (4,), antithetic=True)
    saliency = input_saliency(model, ids, tokens, masks)
    assert saliency.values.shape == (3, 4)
    assert (saliency.values >= 0).all()
    assert agreement(attention, torch.from_numpy(saliency.values)).head.shape == (2, 2)


def test_models_without_cross_attention_are_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    one = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="encoder-decoder with cross-attention"):
        cross_attention_maps(model, one, one)
    with pytest.raises(ValueError, match="encoder-decoder"):
        ForcedDecoding(nn.Linear(2, 2), one, one)
    with pytest.raises(ValueError, match="one sequence each"):
        cross_attention_maps(model, one.expand(2, -1), one)


class OneHead(nn.Module):
    """A decoder that reads a memory by fixed attention and a linear output."""

    def __init__(self, weights: Tensor, values: Tensor, output: Tensor) -> None:
        super().__init__()
        self.weights, self.values, self.output = weights, values, output

    def forward(self, masks: Tensor) -> Tensor:
        read = torch.einsum("is,bs,sd->bid", self.weights, masks, self.values)
        return torch.log_softmax(read @ self.output, dim=-1)


def test_attention_explains_a_decoder_that_only_attends() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, frames, width = 6, 16, 64
    weights = torch.randn(tokens, frames, generator=generator).softmax(-1)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:frames]
    masks = random_masks(4000, (frames,), antithetic=True, generator=generator)
    vocabulary = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    def agree(values: Tensor) -> tuple[float, float]:
        model = OneHead(weights, values, vocabulary)
        saliency = occlusion_saliency(model, masks, batch_size=500).values
        wanted = normalise_map(torch.from_numpy(saliency))
        raw = correlate(normalise_map(weights), wanted)
        fetched = value_weighted(weights[None, None], values[None, None])[0, 0]
        return float(raw), float(correlate(normalise_map(fetched), wanted))

    even, _ = agree(directions)
    assert even > 0.95
    lengths = torch.exp(torch.randn(frames, 1, generator=generator))
    raw, weighted = agree(directions * lengths)
    assert raw < even - 0.2
    assert weighted > 0.9


def test_aggregate_refuses() -> None:
    attention = torch.full((2, 3, 4, 5), 0.2)
    for options in ({"layers": [2]}, {"heads": [-1]}, {"layers": []}, {"pairs": [(0, 3)]}):
        with pytest.raises(ValueError, match="numbers from 0"):
            aggregate(attention, **options)
    with pytest.raises(ValueError, match="None beside"):
        aggregate(attention, [0], pairs=[(0, 0)])
