"""Edits by functions of one's own, and what all editors share."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

import regard.steer
import tiny_models as tiny
from regard.lens.tap import Attention, tap
from regard.steer import edit
from regard.steer.context import Steering, watching

IDS = torch.tensor([[11, 28, 10, 17, 14, 26, 5, 9]])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_the_three_places_say_the_same_thing(implementation: str) -> None:
    """Hiding a key, taking its weight, and the output without it."""
    model = tiny.decoder("Llama", implementation)

    def pre(scores: torch.Tensor, attention: Attention) -> torch.Tensor:
        return scores.index_fill(-1, torch.tensor([3]), torch.finfo(scores.dtype).min)

    def post(weights: torch.Tensor, attention: Attention) -> torch.Tensor:
        weights = weights.index_fill(-1, torch.tensor([3]), 0)
        return weights / weights.sum(-1, keepdim=True)

    def output(out: torch.Tensor, attention: Attention) -> torch.Tensor:
        weights = post(attention.weights_of(attention.heads, attention.rows), attention)
        return attention.mix(weights, attention.heads)

    rows = {"queries": slice(-2, None), "heads": [1, 2], "layers": [1]}
    results = []
    for place in ({"pre": pre}, {"post": post}, {"output": output}):
        with edit(model, **place, **rows):
            results.append(model(IDS).logits)
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert torch.allclose(results[0], results[2], atol=1e-5)
    plain = model(IDS).logits
    assert torch.equal(results[0][:, :6], plain[:, :6])
    assert not torch.allclose(results[0][:, 6:], plain[:, 6:], atol=1e-3)


@torch.no_grad()
def test_functions_that_change_nothing_cost_no_bit() -> None:
    for implementation in ("eager", "sdpa"):
        model = tiny.decoder("Llama", implementation)
        plain = model(IDS).logits
        for place in ("pre", "post", "output"):
            with edit(model, **{place: lambda values, attention: None}):
                assert torch.equal(model(IDS).logits, plain)


@torch.no_grad()
def test_what_is_masked_stays_masked() -> None:
    model = tiny.decoder("Llama", "sdpa")
    seen: list[torch.Tensor] = []
    flat = edit(model, pre=lambda scores, attention: torch.zeros_like(scores))
    with flat, tap(model, read=lambda a: seen.append(a.weights)):
        model(IDS)
    even = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    assert all(torch.allclose(weights, even, atol=1e-6) for weights in seen)


@torch.no_grad()
def test_cross_attention_only() -> None:
    model = tiny.whisper("sdpa")
    inputs = {
        "input_features": torch.randn(1, 8, 40),
        "decoder_input_ids": torch.tensor([[1, 5, 6]]),
    }
    shapes: list[tuple[int, ...]] = []

    def post(weights: torch.Tensor, attention: Attention) -> None:
        shapes.append(tuple(weights.shape))

    with edit(model, post=post, kind="cross"):
        model(**inputs)
    assert shapes == [(1, 4, 3, 20)] * 2


def test_bad_requests() -> None:
    model = tiny.decoder()
    with pytest.raises(ValueError, match="at least one function"):
        edit(model)
    with pytest.raises(ValueError, match=r"layers \[3\]: the model has layers 0 to 2"):
        edit(model, post=lambda w, a: None, layers=3)
    with pytest.raises(ValueError, match="its step must be 1"):
        edit(model, post=lambda w, a: None, queries=slice(None, None, 2))
    with pytest.raises(AttributeError, match="no attribute 'edits'"):
        _ = regard.steer.edits  # type: ignore[attr-defined]


def test_parts_close_in_reverse_whatever_happens() -> None:
    events: list[str] = []

    @contextmanager
    def part(name: str) -> Any:
        if name == "bad":
            raise ValueError("does not open")
        events.append(f"+{name}")
        try:
            yield
        finally:
            events.append(f"-{name}")

    class Made(Steering):
        names = ("a", "b")

        def parts(self) -> list[Any]:
            return [part(name) for name in self.names]

    made = Made()
    with made, made:
        assert events == ["+a", "+b", "+a", "+b"]
    assert events[4:] == ["-b", "-a", "-b", "-a"]
    events.clear()
    made.names = ("a", "bad", "b")
    with pytest.raises(ValueError, match="does not open"), made:
        pass
    assert events == ["+a", "-a"]
    module = torch.nn.Identity()
    with pytest.raises(TypeError), watching(module, lambda *_: events.append("seen")):
        module(1, 2)  # Identity takes one
    assert events[-1] == "seen"
    assert not module._forward_pre_hooks
