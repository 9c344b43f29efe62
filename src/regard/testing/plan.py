"""What a tier runs: which laws, on which patterns and cases."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import regard.testing.laws  # noqa: F401  (fills LAWS)
from regard.core.card import Card, Case
from regard.core.patterns import Pattern
from regard.testing.law import LAWS, Law
from regard.testing.subject import Subject

Tier = Literal["fast", "slow"]


@dataclass(frozen=True)
class Visit:
    """One law, to be applied to one subject."""

    law: Law
    subject: Subject


class Planner:
    """Chooses visits for one card, on one device, with one seed.

    Fast: a cheap law on every pattern and a costly one on the first that it has, each with the
    case that the seed chooses (a costly one with the first case); a rotated law on one pattern
    and case that the seed chooses. Slow: every law on every pattern and case. A law that the
    card excepts is visited everywhere in both tiers: it must break somewhere.
    """

    def __init__(self, card: Card, device: str = "cpu", tier: Tier = "fast", seed: int = 0) -> None:
        self.card, self.device, self.tier, self.seed = card, device, tier, seed
        self._subjects: dict[tuple[str, str], Subject] = {}

    def visits(self, law: Law, patterns: Sequence[Pattern] | None = None) -> list[Visit]:
        """Where this law is applied, among the given patterns; none if it says nothing there."""
        if law.refuses(self.card):
            return []
        fitting = law.applicable(self.card)
        allowed = fitting if patterns is None else [p for p in fitting if p in patterns]
        cases, excepted = self.card.cases, law.name in self.card.laws_except
        if self.tier == "slow" or excepted:
            places = [(pattern, case) for case in cases for pattern in allowed]
        elif law.cost == "slow":
            return []
        elif law.cost == "cheap":
            places = [(pattern, self._pick(cases, law.name, pattern.value)) for pattern in allowed]
        elif patterns is not None:  # the caller has chosen
            places = [(pattern, self._case(law, pattern)) for pattern in allowed]
        else:
            pattern = fitting[0] if Pattern.CAUSAL_SELF not in fitting else Pattern.CAUSAL_SELF
            if law.cost == "rotated":
                pattern = self._pick(fitting, law.name)
            places = [(pattern, self._case(law, pattern))]
        return [Visit(law, self.subject(law, pattern, case)) for pattern, case in places]

    def subject(self, law: Law, pattern: Pattern, case: Case) -> Subject:
        """The subject of one visit; what it serves is learnt once per pattern and case."""
        place = (pattern.value, case.name)
        if place not in self._subjects:
            self._subjects[place] = Subject(
                self.card, case, pattern, self.device, self.seed, thorough=self.tier == "slow"
            )
        return self._subjects[place].under(law.name)

    def _case(self, law: Law, pattern: Pattern) -> Case:
        if law.cost == "costly":
            return self.card.cases[0]
        return self._pick(self.card.cases, law.name, pattern.value)

    def _pick(self, choices: Sequence[Any], *salt: str) -> Any:
        words = repr((self.seed, self.card.name, *salt)).encode()
        return choices[zlib.crc32(words) % len(choices)]


def find_laws(names: Iterable[str] | None) -> list[Law]:
    """The laws of these names, all by default; the nearest name is offered for a misspelt one."""
    if names is None:
        return list(LAWS.values())
    if isinstance(names, str):
        raise TypeError(f"check: laws must be a list of names, got the word {names!r}")
    found = []
    for name in names:
        if name not in LAWS:
            near = get_close_matches(str(name), LAWS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"check: laws must be among {', '.join(LAWS)}, got {name!r}{hint}")
        found.append(LAWS[name])
    return found


def find_patterns(patterns: Iterable[Pattern | str] | None) -> list[Pattern] | None:
    """Patterns, or their words."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise TypeError(f"check: patterns must be a list, got the word {patterns!r}")
    found = []
    for pattern in patterns:
        try:
            found.append(Pattern(pattern))
        except ValueError:
            words = ", ".join(p.value for p in Pattern)
            raise ValueError(f"check: patterns must be among {words}, got {pattern!r}") from None
    return found
