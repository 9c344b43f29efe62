"""A law is data: a function of a subject, and what decides where it applies and what it costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from regard.core.card import Card
from regard.core.patterns import ALL_PATTERNS, Pattern

if TYPE_CHECKING:
    from regard.testing.subject import Subject

Cost = Literal["cheap", "rotated", "costly", "slow"]


class LawBroken(AssertionError):
    """A mechanism does not keep a law; the message says where, by how much, and how to see it."""


class DoesNotApply(Exception):
    """Raised inside a law that finds only while running that it has nothing to check."""


@dataclass(frozen=True)
class Law:
    """One promise that every mechanism keeps.

    `needs` are arguments that the op must have, `states` the kinds of state (of the card) that
    it is about, `patterns` those in which it says something. `cost` decides what the fast
    tier runs: "cheap" on every pattern, "rotated" on one pattern and case that the seed
    chooses, "costly" on one fixed pattern, "slow" not at all.
    """

    name: str
    function: Callable[[Subject], str | None]
    needs: Sequence[str] = ()
    states: Sequence[str] = ()
    patterns: Sequence[Pattern] = ALL_PATTERNS
    cost: Cost = "cheap"

    @property
    def meaning(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def refuses(self, card: Card) -> str | None:
        """Why the law says nothing about this card, or None if it applies."""
        missing = [name for name in self.needs if not card.accepts(name)]
        if missing:
            return f"the op has no argument {missing[0]}"
        if self.states and card.state not in self.states:
            return "the mechanism has no state" if card.state is None else "of another state kind"
        if not self.applicable(card):
            return "of none of its patterns"
        return None

    def applicable(self, card: Card) -> tuple[Pattern, ...]:
        """The card's patterns in which the law says something."""
        return tuple(pattern for pattern in card.patterns if pattern in self.patterns)


LAWS: dict[str, Law] = {}


def law(
    *,
    needs: Sequence[str] = (),
    states: Sequence[str] = (),
    patterns: Sequence[Pattern] = ALL_PATTERNS,
    cost: Cost = "cheap",
) -> Callable[[Callable[[Subject], str | None]], Callable[[Subject], str | None]]:
    """Adds a function to the suite under its own name."""

    def add(function: Callable[[Subject], str | None]) -> Callable[[Subject], str | None]:
        name = function.__name__
        LAWS[name] = Law(name, function, tuple(needs), tuple(states), tuple(patterns), cost)
        return function

    return add
