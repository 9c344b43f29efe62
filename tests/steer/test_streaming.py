"""Calibration and redistribution of long prompts hold no map of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import tiny_models as tiny
from regard.lens.taps import edits
from regard.steer import act_calibration, visual_attention_redistribution
from tensor_sizes import Largest

IMAGE = [65] * 16
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
VAR: dict[str, Any] = {"rho": 1.0, "min_mass": 0.0, "skip_layers": [0]}
Steered = Callable[[Any], AbstractContextManager[Any]]
EDITORS: dict[str, Steered] = {
    "act": lambda model: act_calibration(
        model, {0: [0, 2], 2: [1]}, theta=0.06, where="language_model"
    ),
    "act, a part": lambda model: act_calibration(
        model, theta=None, alpha=1.5, prompt=19, where="language_model"
    ),
    "var by input": lambda model: visual_attention_redistribution(model, [11], tau=1.5, **VAR),
    "var by weight": lambda model: visual_attention_redistribution(
        model, "attention", alpha=1.2, prompt=20, **VAR
    ),
}


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_blocks_change_what_the_whole_changes(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llava(implementation)
    text = torch.tensor([[1, 5, *IMAGE, 9, 10, 11, 12], [0, 0, 1, *IMAGE, 4, 7, 13]])
    options = {"pixel_values": PIXELS, "attention_mask": (text != 0).long()}
    options |= {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(text, **options).logits[0]
    results, contexts = [], []
    for rows in (1000, 5):
        monkeypatch.setattr(edits, "WEIGHTS", 1)
        monkeypatch.setattr(edits, "LEAST_ROWS", rows)
        with EDITORS[name](model) as context:
            results.append(model.generate(text, **options))
        contexts.append(context)
    whole, parts = results
    assert not torch.allclose(whole.logits[0], plain, atol=1e-3)
    assert torch.equal(whole.sequences, parts.sequences)
    for a, b in zip(whole.logits, parts.logits, strict=True):
        assert torch.allclose(a, b, atol=5e-6)
    for key, sinks in contexts[0].sinks.items():
        assert torch.equal(sinks, contexts[1].sinks[key])
        assert sinks.any()


@pytest.mark.parametrize("name", EDITORS)
@torch.no_grad()
def test_a_long_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    T, heads, rows = 600, 4, 16
    monkeypatch.setattr(edits, "WEIGHTS", heads * rows * T)
    monkeypatch.setattr(edits, "LEAST_ROWS", 1)
    model = tiny.llava("sdpa", max_position_embeddings=T)
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (1, T - 16), generator=made)
    ids = torch.cat([ids[:, :5], torch.tensor([IMAGE]), ids[:, 5:]], 1)
    inputs = {"input_ids": ids, "pixel_values": PIXELS[:1], "logits_to_keep": 1}
    with EDITORS[name](model) as context, Largest() as seen:
        model(**inputs)
    assert context.sinks
    assert seen.numbers <= max(heads * rows * T, T * 70), "more than a block was held"
    assert seen.numbers < T * T
