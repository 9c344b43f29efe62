"""Tables made from cards."""

from __future__ import annotations

from typing import get_args

import torch

import regard
from regard.core.budgets import Quantity, budget
from regard.testing import LAWS, tables


def test_every_mechanism_has_a_row() -> None:
    head, rule, *rows = tables.table(link="mechanisms/{name}.md").splitlines()
    assert head.count("|") == rule.count("|")
    for name, row in zip(regard.mechanisms, rows, strict=True):
        card = regard.mechanisms[name]
        assert row.startswith(f"| [`{name}`](mechanisms/{name}.md) | ")
        assert card.paper.title in row
        assert f"https://arxiv.org/abs/{card.paper.arxiv}" in row
        assert card.cost in row


def test_a_card_in_words() -> None:
    for card in regard.mechanisms.values():
        text = tables.card_page(card)
        assert text.startswith(card.summary)
        for case in card.cases:
            assert case.name in text
        for reason in card.laws_except.values():
            assert reason in text
        for _, reason in card.budgets.values():
            assert reason in text


def test_every_law_has_a_meaning() -> None:
    text = tables.law_table()
    for law in LAWS.values():
        assert law.meaning.endswith(".")
        assert f"| `{law.name}` | " in text


def test_budgets_are_those_of_core() -> None:
    text = tables.budget_table()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        row = [f"`{str(dtype)[6:]}`", *(f"{budget(dtype, q):g}" for q in get_args(Quantity))]
        assert f"| {' | '.join(row)} |" in text
    for card in regard.mechanisms.values():
        assert all(reason in text for _, reason in card.budgets.values())
