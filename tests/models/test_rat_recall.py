"""What a chunk costs: associative recall by attention, RAT and the recurrent network."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import regard

LENGTH, PAIRS, ASKED, NOISE = 64, 6, 10, 32
# At this width the standard deviations that torch's layers start with, as 0.02 learns too slowly.
SMALL = {"dim": 48, "layers": 2, "mlp_dim": 96, "vocabulary": 48, "tied": False, "init_std": 0.083}
WITH_HEADS = {**SMALL, "heads": 2}
MODELS = {
    "attention": ("rat_attention", WITH_HEADS),
    "RAT, L=4": ("rat", {**WITH_HEADS, "groups": 2, "chunk_length": 4}),
    "RAT, L=16": ("rat", {**WITH_HEADS, "groups": 2, "chunk_length": 16}),
    "recurrent": ("rat_rnn", {**SMALL, "longest": LENGTH}),
}


def batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Six pairs of a key (0-15) and a value (16-31), then noise (32-47) in which ten keys come
    again; only there a label, the value."""
    keys = torch.rand(rows, 16, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(16, 32, (rows, PAIRS), generator=generator)
    tokens = torch.randint(NOISE, 48, (rows, LENGTH), generator=generator)
    tokens[:, : 2 * PAIRS] = torch.stack([keys, values], 2).flatten(1)
    first = 2 * PAIRS + 1
    places = torch.rand(rows, LENGTH - first, generator=generator).argsort(1)[:, :ASKED] + first
    which = torch.randint(PAIRS, (rows, ASKED), generator=generator)
    tokens.scatter_(1, places, keys.gather(1, which))
    labels = torch.full((rows, LENGTH), -100).scatter_(1, places, values.gather(1, which))
    return tokens, labels


def recall(name: str) -> float:
    """The share of right answers on new rows, after 500 steps on 60 fixed batches."""
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    model = regard.create_model(kind, **sizes)
    torch.nn.init.normal_(model.embed.weight)
    generator = torch.Generator().manual_seed(1)
    batches = [batch(64, generator) for _ in range(60)]
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(500):
        tokens, labels = batches[step % len(batches)]
        loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokens, labels = batch(512, generator)
    with torch.no_grad():
        found = model(tokens).argmax(2)
    asked = labels >= 0
    return float((found == labels)[asked].double().mean())


@pytest.mark.slow
def test_recall_falls_with_the_length_of_a_chunk():
    found = {name: recall(name) for name in MODELS}
    assert found["attention"] >= 0.95, found
    assert found["RAT, L=4"] >= 0.95, found
    assert found["recurrent"] <= 0.5, found
    assert found["RAT, L=16"] < found["RAT, L=4"], found
    assert abs(found["RAT, L=16"] - found["recurrent"]) < 0.2, found
