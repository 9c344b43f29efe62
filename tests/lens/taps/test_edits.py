"""Edits that are run block of rows by block of rows change what they change all at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

import tiny_models as tiny
from regard.lens.reductions import Reduce
from regard.lens.tap import Attention, Edit, tap
from regard.lens.taps import edits
from tensor_sizes import Largest

IDS = torch.tensor([[0, 0, 0, 11, 28, 10, 17, 14, 26], [9, 5, 33, 41, 12, 50, 7, 8, 60]])
REAL = (IDS != 0).long()
CASES = [("Gemma2", "eager"), ("GptOss", "eager")]  # (these have no sdpa)
CASES += product(["Llama", "Mistral"], ["eager", "sdpa"])


@pytest.fixture(params=[2, 4])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(edits, "WEIGHTS", 1)
    monkeypatch.setattr(edits, "LEAST_ROWS", request.param)
    return request.param


def blunt(scores: torch.Tensor, _: Attention) -> torch.Tensor:
    return scores / 2


def sharp(weights: torch.Tensor, _: Attention) -> torch.Tensor:
    return weights**3 / (weights**3).sum(-1, keepdim=True).clamp_min(1e-9)


def run(model: Any, *changes: Edit) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    """Logits, the weights that a reader sees in blocks, and those that the model reports."""
    seen: list[torch.Tensor] = []
    summary = Reduce(top=2)

    def read(attention: Attention) -> None:
        weights = attention.weights
        blocks = [part for _, part in attention.blocks(3)]
        assert torch.allclose(torch.cat(blocks, 2), weights, atol=1e-6)
        seen.append(weights)
        summary(attention)

    with torch.no_grad(), tap(model, read=read):
        opened = [tap(model, edit=change) for change in changes]
        for one in opened:
            one.__enter__()
        eager = model.config._attn_implementation == "eager"
        result = model(IDS, attention_mask=REAL, output_attentions=eager)
        for one in opened:
            one.__exit__(None, None, None)
    sums = torch.stack([part.entropy for part in summary.result()])
    return result.logits, [*seen, sums], result.attentions if eager else ()


@pytest.mark.parametrize(("kind", "implementation"), CASES)
def test_blocks_equal_the_whole(kind: str, implementation: str, small_blocks: int) -> None:
    model = tiny.decoder(kind, implementation)
    chosen = {0: [0, 3], 1: [1], 2: [0, 1, 2, 3]}
    one = {"pre": blunt, "post": sharp, "heads": chosen}
    two = {"post": lambda w, a: w if a.layer else None, "heads": [2], "queries": slice(3, 8)}
    whole = run(model, Edit(**one), Edit(**two))
    parts = run(model, Edit(**one, by_rows=True), Edit(**two, by_rows=True))
    mixed = run(model, Edit(**one), Edit(**two, by_rows=True))
    plain = run(model)
    assert not torch.allclose(whole[0], plain[0], atol=1e-3)
    for other in (parts, mixed):
        assert torch.allclose(other[0], whole[0], atol=1e-6 * float(whole[0].abs().max()))
        for these, those in ((other[1], whole[1]), (other[2], whole[2])):
            for a, b in zip(these, those, strict=True):
                assert torch.allclose(a, b, atol=2e-6)


@torch.no_grad()
def test_an_edit_sees_all_rows_before_it_changes_one(small_blocks: int) -> None:
    model = tiny.decoder("Llama", "sdpa")
    order: list[str] = []
    surveyed: dict[int, torch.Tensor] = {}
    given: dict[int, list[torch.Tensor]] = {}

    def survey(blocks: Iterator[tuple[range, torch.Tensor]], attention: Attention) -> None:
        parts, rows = [], []
        for some, weights in blocks:
            assert attention.rows == some
            assert attention.heads == [1, 2]
            assert weights.shape[1:3] == (2, len(some))
            rows += [*some]
            parts.append(weights)
        assert rows == [*range(2, 9)]
        order.append(f"survey {attention.layer}")
        surveyed[attention.layer] = torch.cat(parts, 2)

    def post(weights: torch.Tensor, attention: Attention) -> torch.Tensor:
        order.append(f"post {attention.layer}")
        given.setdefault(attention.layer, []).append(weights)
        return sharp(weights, attention)

    first = Edit(pre=blunt, post=sharp, heads=[0, 2], by_rows=True)
    second = Edit(
        post=post, survey=survey, heads=[1, 2], queries=slice(2, None), by_rows=True
    )  # after the first
    with tap(model, edit=first), tap(model, edit=second):
        model(IDS, attention_mask=REAL)
    assert order[0] == "survey 0"
    assert order.index("survey 1") > max(n for n, what in enumerate(order) if what == "post 0")
    assert len(given[0]) > 1
    for layer, weights in surveyed.items():
        assert torch.equal(torch.cat(given[layer], 2), weights)


@torch.no_grad()
def test_a_survey_alone_and_one_that_looks_away() -> None:
    model, seen = tiny.decoder("Llama", "sdpa"), []
    plain = model(IDS, attention_mask=REAL).logits

    def count(blocks: Iterator[tuple[range, torch.Tensor]], attention: Attention) -> None:
        if attention.layer:
            seen.append(sum(weights.shape[2] for _, weights in blocks))

    with tap(model, edit=Edit(survey=count, by_rows=True)):
        assert torch.equal(model(IDS, attention_mask=REAL).logits, plain)
    assert seen == [9, 9]


@torch.no_grad()
def test_no_map_is_made_for_functions_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    T, heads, rows = 500, 4, 16
    monkeypatch.setattr(edits, "WEIGHTS", heads * rows * T)
    monkeypatch.setattr(edits, "LEAST_ROWS", 1)
    model = tiny.decoder("Llama", "sdpa", max_position_embeddings=T)
    ids, sizes = torch.randint(1, 70, (1, T)), {}
    for by_rows in (False, True):
        change = Edit(pre=blunt, post=sharp, by_rows=by_rows)
        with tap(model, edit=change), Largest() as seen:
            model.model(ids)
        sizes[by_rows] = seen.numbers
    assert sizes[False] >= heads * T * T
    assert sizes[True] <= heads * rows * T
