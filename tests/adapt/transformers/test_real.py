"""Real weights: softmax swapped in is the eager model, and a large ridge is softmax attention."""

from __future__ import annotations

import pytest
import torch

from regard.adapt import transformers as adapt
from regard.recipes.upgrade import equal_ridge
from regard.testing import resources

SENTENCES = ["The quick brown fox jumps over the lazy dog.", "Hello.", "To be, or not to be?"]


@pytest.mark.slow
@pytest.mark.requires("resource:minilm")
@pytest.mark.parametrize("side", ["left", "right"])
def test_minilm(side: str) -> None:
    model, tokens = resources.minilm(attention="eager")
    batch = tokens(SENTENCES, padding=True, padding_side=side, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch).last_hidden_state[real]
        for mechanism, options, most in (
            ("softmax", {}, 1e-5),
            ("local_linear", {"ridge": 1e5, "learn": ("ridge", "bandwidth")}, 1e-3),
        ):
            done = adapt.swap(model, mechanism, **options)
            assert (model(**batch).last_hidden_state[real] - before).abs().max() < most
        done.restore()
        assert torch.equal(model(**batch).last_hidden_state[real], before)


@pytest.mark.slow
@pytest.mark.requires("resource:whisper_tiny")
@pytest.mark.requires("resource:librivox")
def test_the_decoder_of_whisper() -> None:
    model, features, tokens = resources.whisper_tiny(attention="eager")
    spoken = resources.librivox()[:2]
    said = tokens([one.text for one in spoken], padding=True, return_tensors="pt")
    batch = {
        "input_features": features([one.samples for one in spoken]),
        "decoder_input_ids": said.input_ids, "decoder_attention_mask": said.attention_mask,
    }  # fmt: skip
    real = said.attention_mask.bool()
    with torch.no_grad():
        before = model(**batch).logits[real]
        ridge = equal_ridge(
            model, batch, layers="*decoder*", loss=lambda model, batch: model(**batch).logits.sum()
        )
        assert ridge == 1e6
        adapt.swap(model, "local_linear", "*decoder*", ridge=ridge)
        assert (model(**batch).logits[real] - before).abs().max() < 1e-3
