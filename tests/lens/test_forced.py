"""Forced decoding with hidden inputs, of tiny models of several families."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens.examples import tiny_whisper
from regard.lens.forced import ForcedDecoding, encoder_output_saliency, input_saliency
from regard.lens.occlusion_masks import random_masks

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whisper():
    return tiny_whisper()[0]


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    return tiny_whisper()[1]


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


SIZES = {
    "vocab_size": 37, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "init_std": 0.3,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _text(family: str):
    config = getattr(transformers, f"{family}Config")(
        **SIZES, **SPECIAL, scale_embedding=True, max_position_embeddings=32
    )
    name = {"Marian": "MarianMTModel"}.get(family, f"{family}ForConditionalGeneration")
    return getattr(transformers, name)(config), torch.tensor([[5, 9, 11, 7, 3]])


def _speech2text():
    config = transformers.Speech2TextConfig(
        **SIZES, **SPECIAL, input_feat_per_channel=6, conv_channels=8
    )
    return transformers.Speech2TextForConditionalGeneration(config), torch.randn(1, 20, 6)


def _moonshine():
    config = transformers.MoonshineConfig(
        vocab_size=37, hidden_size=16, intermediate_size=16, encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
        **SPECIAL,
    )  # fmt: skip
    return transformers.MoonshineForConditionalGeneration(config), torch.randn(1, 2000)


FAMILIES = {
    "bart": lambda: _text("Bart"),
    "marian": lambda: _text("Marian"),  # scales the embeddings of ids in its encoder
    "m2m100": lambda: _text("M2M100"),  # scales them in the table
    "speech2text": _speech2text,  # time is the first axis
    "moonshine": _moonshine,  # a waveform; its encoder's output holds more than states
}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_hidden_is_the_model_itself(family: str) -> None:
    torch.manual_seed(0)
    model, given = FAMILIES[family]()
    model.eval()
    tokens = torch.tensor([[1, 8, 20]])
    forced = ForcedDecoding(model, given, tokens)
    with torch.no_grad():
        output = model(**{model.main_input_name: given}, decoder_input_ids=tokens)
        wanted = output.logits.log_softmax(-1)
        found = forced.decode(forced.encode(forced.inputs))
        frames = torch.ones(3, given.shape[1])
        both = forced.hide_input(frames)
        frames[1] = 0
        hidden = forced.hide_input(frames)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(both, wanted.expand(3, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[2], wanted[0], atol=1e-5, rtol=0)
    assert (hidden[1] - wanted[0]).abs().max() > 1e-3
    masks = random_masks(4, tuple(forced.inputs.shape[1:]))
    assert input_saliency(model, given, tokens, masks).values.shape == (3, *masks.shape[1:])
    with pytest.raises(ValueError, match="masks must be"):
        forced.hide_input(torch.ones(2, given.shape[1] + 1))
