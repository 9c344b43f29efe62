"""Cross-attention, its agreement with saliency, and what stays as it was: tiny Whisper and BART."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden_files import parts, settings
from regard.lens.agreement import agreement, correlate, normalise_map, pool_saliency
from regard.lens.cross_attention import (
    aggregate,
    alignment_matrix,
    cross_attention,
    cross_attention_maps,
    token_frames,
    value_weighted,
    word_spans,
)
from regard.lens.deletion import deletion_auc, deletion_curve, word_error_rate
from regard.lens.forced import ForcedDecoding, encoder_output_saliency, input_saliency
from regard.lens.gradients import METHODS, gradient_saliency
from regard.lens.occlusion import occlusion_saliency
from regard.lens.occlusion_masks import random_masks

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    return parts("cross_attention_explanation/tiny_whisper")


@pytest.fixture(scope="module")
def whisper(golden: dict[str, dict[str, Tensor]]):
    given = settings("cross_attention_explanation/tiny_whisper")
    config = transformers.WhisperConfig(
        **{name: value for name, value in given.items() if name != "transformers_version"}
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(golden["state"])
    return model


@pytest.fixture(scope="module")
def inputs(golden: dict[str, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    return golden["in"]["input_features"], golden["in"]["decoder_input_ids"]


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
    attention, values = cross_attention(whisper, *inputs)
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


def test_the_encoder_runs_once(whisper, inputs) -> None:
    calls: list[int] = []
    hook = whisper.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        encoder_output_saliency(whisper, *inputs, random_masks(40, (20,)), batch_size=8)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_antithetic_saliency_of_either_input(whisper, inputs) -> None:
    masks = random_masks(12, (8, 40), antithetic=True)
    found = input_saliency(whisper, *inputs, masks, scorer="predicted_token", fill="minimum")
    assert found.values.shape == (5, 8, 40)
    assert found.halves.shape == (2, 5, 8, 40)
    frames = input_saliency(whisper, *inputs, masks[:, 0])  # whole frames
    assert frames.values.shape == (5, 40)
    with pytest.raises(ValueError, match="masks must be"):
        input_saliency(whisper, *inputs, masks[:, :7])
    with pytest.raises(ValueError, match="masks must be"):
        encoder_output_saliency(whisper, *inputs, masks[:, 0])
    with pytest.raises(ValueError, match="fill"):
        input_saliency(whisper, *inputs, masks, fill="silence")


@pytest.mark.requires("captum")
@pytest.mark.parametrize("of", ["input", "encoder"])
def test_gradients(whisper, inputs, of: str) -> None:
    shape = (5, 8, 40) if of == "input" else (5, 20)
    for method in METHODS:
        found = gradient_saliency(whisper, *inputs, method=method, of=of, steps=2)
        assert found.shape == shape
        assert (found >= 0).all()
        assert float(found.sum()) > 0
    forced = ForcedDecoding(whisper, *inputs)
    with torch.no_grad():
        memory = forced.encode(forced.inputs)
    start = (memory if of == "encoder" else forced.inputs).clone().requires_grad_()
    out = forced.decode(start if of == "encoder" else forced.encode(start))
    out[0, 1, inputs[1][0, 2]].backward()
    assert start.grad is not None
    wanted = start.grad[0].abs()
    wanted = wanted.sum(-1) if of == "encoder" else wanted
    found = gradient_saliency(whisper, *inputs, method="gradient", of=of)
    close(found[1], wanted, 1e-6)


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


def test_the_path_of_an_alignment() -> None:
    matrix = torch.full((3, 9), -1.0)
    for i, (first, last) in enumerate(((0, 1), (2, 5), (6, 8))):
        matrix[i, first : last + 1] = 1.0
    frames = token_frames(matrix)
    assert frames.tolist() == [[0, 1], [2, 5], [6, 8]]
    spans = word_spans([" he", "llo", " you"], frames, seconds_per_frame=0.02)
    assert [word for word, *_ in spans] == ["hello", "you"]
    assert spans[0][1:] == pytest.approx((0.0, 0.12))
    assert spans[1][1:] == pytest.approx((0.12, 0.18))
    with pytest.raises(ValueError, match="frames must be"):
        word_spans([" a"], frames, seconds_per_frame=0.02)


def test_alignment_matrix_forgets_what_every_token_looks_at() -> None:
    attention = torch.full((1, 2, 3, 12), 0.01)
    attention[..., 0] = 0.9  # a sink
    for i in range(3):
        attention[0, 0, i, 4 * i : 4 * i + 4] += 0.2
    found = alignment_matrix(attention, [(0, 0)], smooth=1)
    assert [int(row.argmax()) // 4 for row in found] == [0, 1, 2]
    assert alignment_matrix(attention, [(0, 0)], frames=9, smooth=3).shape == (3, 9)
    with pytest.raises(ValueError, match="pairs must be"):
        alignment_matrix(attention, [(1, 0)])
    with pytest.raises(ValueError, match="odd"):
        alignment_matrix(attention, [(0, 0)], smooth=4)


def test_aggregate_refuses() -> None:
    attention = torch.full((2, 3, 4, 5), 0.2)
    for options in ({"layers": [2]}, {"heads": [-1]}, {"layers": []}, {"pairs": [(0, 3)]}):
        with pytest.raises(ValueError, match="numbers from 0"):
            aggregate(attention, **options)
    with pytest.raises(ValueError, match="None beside"):
        aggregate(attention, [0], pairs=[(0, 0)])


def test_deletion_prefers_the_true_map() -> None:
    truth = torch.zeros(4, 10)
    truth[1, 2:5] = 1

    def error(kept: Tensor) -> float:
        return 100 * float(1 - (kept * truth).sum() / truth.sum())

    good, bad = deletion_curve(truth, error), deletion_curve(-truth, error)
    assert good.area > 90 > 20 > bad.area
    assert good.scores[0] == 0
    assert good.scores[-1] == pytest.approx(100)
    assert deletion_auc(truth, error) == good.area
    with pytest.raises(ValueError, match="rising"):
        deletion_curve(truth, error, percent=(0, 50, 50))


def test_word_error_rate() -> None:
    assert word_error_rate("a b c d", "a x c") == 50
    assert word_error_rate("a", "b c d") == 100
    assert word_error_rate("a", "b c d", most=None) == 300
    assert word_error_rate(["a", "b"], []) == 100
    with pytest.raises(ValueError, match="at least one word"):
        word_error_rate("", "a")


@pytest.mark.slow
@pytest.mark.requires("resource:whisper_tiny", "resource:librivox")
def test_alignment_heads_follow_real_speech() -> None:
    from regard.testing import resources

    utterance = resources.librivox()[4]
    speech = resources.whisper_tiny()
    features = speech.features([utterance.samples])
    with torch.no_grad():
        said = [t for t in speech.model.generate(features)[0].tolist() if t < 50256]
    assert word_error_rate(utterance.text, speech.tokenizer.decode(said).strip(" .").lower()) == 0
    attention = cross_attention_maps(speech.model, features, torch.tensor([[50257, 50362, *said]]))
    assert attention.shape == (4, 6, 2 + len(said), 1500)
    frames = round(utterance.seconds * 50)
    matrix = alignment_matrix(attention[:, :, 1:], resources.WHISPER_ALIGNMENT_HEADS, frames=frames)
    pieces = [speech.tokenizer.decode([token]) for token in said]
    spans = word_spans(pieces, token_frames(matrix)[: len(said)], seconds_per_frame=0.02)
    assert len(spans) == len(utterance.words)
    errors = [abs(s[1] - w.start) for s, w in zip(spans, utterance.words, strict=True)]
    assert np.median(errors) < 0.1
