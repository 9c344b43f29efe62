"""Tables of mechanisms and laws in Markdown, made from the cards and the suite themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from regard.core import budgets
from regard.core.card import Card
from regard.core.checks import FLOATS, name_of
from regard.core.patterns import ALL_PATTERNS

COLUMNS = ("mechanism", "paper", "year", "patterns", "time", "memory", "state")


def table(cards: Iterable[Card] | None = None, *, link: str | None = None) -> str:
    """Mechanisms with paper, year, patterns, cost, memory and state; all known ones by default.

    With `link` the names are links, `"{name}"` in it standing for the name.

    >>> import regard
    >>> print(table([regard.mechanisms["softmax"]]).splitlines()[0])
    | mechanism | paper | year | patterns | time | memory | state |
    """
    rows = []
    for card in _all(cards):
        name = (
            f"`{card.name}`" if link is None else f"[`{card.name}`]({link.format(name=card.name)})"
        )
        rows.append((name, _paper(card), *(_facts(card)[column] for column in COLUMNS[2:])))
    return _markdown(COLUMNS, rows)


def card_page(one: Card) -> str:
    """What the card of one mechanism says: summary, facts, cases, operands, exceptions."""
    facts = {"paper": _paper(one), **_facts(one)}
    if one.paper.code:
        facts["authors' code"] = f"<{one.paper.code}> ({one.paper.licence or 'no licence stated'})"
    cases = [f"{c.name} ({_arguments(c.options)})" if c.options else c.name for c in one.cases]
    facts["tested as"] = ", ".join(cases)
    if one.operands:
        facts["operands"] = ", ".join(f"`{o.name}` [{o.shape}]" for o in one.operands)
    if one.tune:
        facts["tuned by"] = ", ".join(f"`{name}`" for name in one.tune)
    for dtype, (size, reason) in one.budgets.items():
        facts[f"error in {dtype}"] = f"{size:g}: {reason}"
    parts = [one.summary, "", _markdown(("", ""), [(k, v) for k, v in facts.items() if v])]
    if one.laws_except:
        parts += ["Laws of the contract suite that cannot hold for it:", "", exceptions([one])]
    return "\n".join(parts)


def _all(cards: Iterable[Card] | None) -> list[Card]:
    import regard

    return list(regard.mechanisms.values() if cards is None else cards)


def _paper(card: Card) -> str:
    title, arxiv = card.paper.title, card.paper.arxiv
    return f"[{title}](https://arxiv.org/abs/{arxiv})" if arxiv else title


def _facts(card: Card) -> dict[str, str]:
    patterns = ", ".join(pattern.value.replace("_", " ") for pattern in card.patterns)
    if set(card.patterns) == set(ALL_PATTERNS):
        patterns = "all four"
    return {
        "year": str(card.paper.year or ""),
        "patterns": patterns,
        "time": card.cost,
        "memory": card.memory,
        "state": {"cache": "keys and values", "fixed": "fixed size", None: "none"}[card.state],
    }


def _arguments(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def exceptions(cards: Iterable[Card] | None = None) -> str:
    """The laws that a mechanism is excused from, with its reason; empty if there are none."""
    rows = [
        (f"`{card.name}`", law, reason)
        for card in _all(cards)
        for law, reason in card.laws_except.items()
    ]
    return _markdown(("mechanism", "law", "why it cannot hold"), rows) if rows else ""


def law_table() -> str:
    """The laws and what each of them means."""
    from regard.testing.plan import LAWS

    return _markdown(("law", "meaning"), [(f"`{x.name}`", x.meaning) for x in LAWS.values()])


def budget_table() -> str:
    """The error that each dtype is allowed, and the mechanisms that are allowed more."""
    names = get_args(budgets.Quantity)
    rows = []
    for dtype in FLOATS:
        errors = (f"{budgets.budget(dtype, name):g}" for name in names)
        rows.append((f"`{name_of(dtype)}`", *errors))
    looser = [
        (f"`{card.name}`", f"`{dtype}`", f"{size:g}", reason)
        for card in _all(None)
        for dtype, (size, reason) in card.budgets.items()
    ]
    text = _markdown(("dtype", *names), rows)
    if looser:
        text += "\n" + _markdown(("mechanism", "dtype", "value", "why"), looser)
    return text


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    head = list(head)
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)]) + "\n"
