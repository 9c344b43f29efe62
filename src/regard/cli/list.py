"""`regard list`: every mechanism, from its card."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import regard
from regard.cli.forms import able, forms_on
from regard.cli.output import print_json, print_table
from regard.core.card import Card
from regard.core.patterns import ALL_PATTERNS


def list_mechanisms(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the attention mechanisms: where they come from, what they serve, what they cost."""
    cards = [regard.mechanisms[name] for name in regard.mechanisms]
    if as_json:
        print_json([describe(card) for card in cards])
        return
    rows = [_row(card) for card in cards]
    print_table(("name", "paper", "year", "patterns", "cost", "state", "forms on cpu"), rows)


def describe(card: Card) -> dict[str, Any]:
    """A card as plain data."""
    paper = card.paper
    return {
        "name": card.name,
        "summary": card.summary,
        "paper": {
            "title": paper.title,
            "arxiv": paper.arxiv,
            "year": paper.year,
            "code": paper.code,
            "licence": paper.licence,
        },
        "patterns": [pattern.value for pattern in card.patterns],
        "cost": card.cost,
        "memory": card.memory,
        "state": card.state,
        "operands": [operand.name for operand in card.operands],
        "forms": able(forms_on(card, "cpu")),
        "laws_except": dict(card.laws_except),
        "tune": {name: list(grid) for name, grid in card.tune.items()},
    }


def _row(card: Card) -> tuple[str, ...]:
    paper = card.paper
    title = f"{paper.title} ({paper.arxiv})" if paper.arxiv else paper.title
    everything = set(card.patterns) == set(ALL_PATTERNS)
    patterns = "all" if everything else ", ".join(pattern.value for pattern in card.patterns)
    forms = ", ".join(able(forms_on(card, "cpu"))) or "none"
    return card.name, title, str(paper.year or ""), patterns, card.cost, card.state or "none", forms
