"""Tokens made one by one."""

from __future__ import annotations

import re

import pytest
import torch

from models.subjects import decoder, ids
from regard.models import generate

NAMES = [("softmax",), ("mesa",), ("parallax", "local_linear")]


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
def test_greedy_is_the_most_probable_token_each_time(names):
    model, tokens = decoder(*names), ids(2, 4)
    made = generate(model, tokens, 5)
    line = tokens
    for _ in range(5):
        line = torch.cat([line, model(line)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, line[:, 4:])


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
def test_padded_prompts_give_what_each_gives_alone(names):
    model = decoder(*names)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    tokens = torch.where(mask, ids(4, 4), -1)
    made = generate(model, tokens, 4, key_mask=mask)
    for row in range(4):
        assert torch.equal(made[row], generate(model, tokens[row, mask[row]][None], 4)[0])


def test_chance_comes_from_the_generator():
    model, tokens = decoder("mesa"), ids(3, 4)

    def sampled(**settings):
        chance = torch.Generator().manual_seed(5)
        return generate(model, tokens, 6, temperature=1.0, generator=chance, **settings)

    assert torch.equal(sampled(), sampled())
    assert torch.equal(sampled(top_k=1), generate(model, tokens, 6))
    assert not torch.equal(sampled(), generate(model, tokens, 6))


def test_frequencies_are_those_of_the_model():
    model, tokens = decoder("softmax"), ids(1, 4).expand(4000, 4)
    with torch.no_grad():
        logits = model(tokens[:1])[0, -1] / 2
    best = logits.topk(3).indices
    chance = torch.Generator().manual_seed(0)
    made = generate(model, tokens, 1, temperature=2.0, top_k=3, generator=chance)
    counts = torch.bincount(made[:, 0], minlength=len(logits))
    assert counts[best].sum() == 4000
    expected = logits[best].softmax(0)
    assert (counts[best] / 4000 - expected).abs().max() < 0.04  # five standard errors


def test_a_row_ends_with_the_stop():
    model, tokens = decoder("mesa"), ids(2, 4)
    free = generate(model, tokens, 6)
    stop = int(free[0, 2])
    made = generate(model, tokens, 6, stop=stop)
    for row in range(2):
        places = (free[row] == stop).nonzero().flatten().tolist()
        end = places[0] if places else made.shape[1]
        assert torch.equal(made[row, :end], free[row, :end])
        assert bool((made[row, end:] == stop).all())


def test_no_token_asked_for_and_mode_left_alone():
    model = decoder("softmax").train()
    assert generate(model, ids(2, 3), 0).shape == (2, 0)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": ids(2, 0)}, "tokens must be at least one real token in every row"),
        ({"key_mask": torch.tensor([[1, 0], [0, 0]]).bool()}, "at least one real token in every"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0"),
        ({"top_k": 3}, "top_k must be None at temperature 0"),
        ({"length": -1}, "length must be an int of at least 0"),
        ({"stop": -1}, "stop must be an int of at least 0"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        generate(**{"model": decoder("softmax"), "tokens": ids(2, 2), "length": 3, **settings})
