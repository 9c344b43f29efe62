"""Which layer of a model can take which mechanism, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from regard.adapt.fitting import CARDS, refuses
from regard.adapt.site import Site

FACTS = ("kind", "causal", "heads", "kv_heads", "head_dim", "window", "softcap")


@dataclass(frozen=True)
class Report:
    """The attention layers of a model, and for each mechanism -> the reason against it, or None."""

    model: str
    layers: tuple[Site, ...]
    reasons: tuple[dict[str, str | None], ...]
    swapped: tuple[str | None, ...]

    def can(self, mechanism: str) -> tuple[str, ...]:
        """The layers that can take it."""
        pairs = zip(self.layers, self.reasons, strict=True)
        return tuple(site.name for site, why in pairs if why[mechanism] is None)

    def rows(self) -> list[tuple[str, str, str]]:
        """(layers, mechanism, "yes" or why not), layers of equal answers together."""
        groups: dict[tuple, list[Site]] = {}
        for site, why in zip(self.layers, self.reasons, strict=True):
            groups.setdefault((site.kind, tuple(why.items())), []).append(site)
        return [
            (_names(members), name, "yes" if reason is None else f"no: {reason}")
            for (_, answers), members in groups.items()
            for name, reason in answers
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        items = zip(self.layers, self.reasons, self.swapped, strict=True)
        return {
            "model": self.model,
            "layers": [
                {"number": site.number, "name": site.name, "pattern": site.pattern.value}
                | {fact: getattr(site, fact) for fact in FACTS}
                | {"sinks": site.sinks, "swapped": now, "mechanisms": why}
                for site, why, now in items
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.layers)} attention layers"]
        return "\n".join([*lines, *(f"  {a}  {b}  {c}" for a, b, c in self.rows())])


def fill(
    model: nn.Module,
    found: tuple[Site, ...],
    swapped: tuple[str | None, ...],
    unreachable: Callable[[Site], str | None],
) -> Report:
    """The report on these layers; `unreachable`: what stands against any mechanism."""

    def reasons(site: Site) -> dict[str, str | None]:
        always = unreachable(site)
        return {name: always or refuses(card, site) for name, card in CARDS.items()}

    return Report(type(model).__name__, found, tuple(map(reasons, found)), swapped)


def _names(members: list[Site]) -> str:
    first, last = members[0], members[-1]
    numbers = str(first.number) if len(members) == 1 else f"{first.number}..{last.number}"
    if len(members) > 1 and last.number - first.number + 1 != len(members):
        numbers = ",".join(str(site.number) for site in members)
    return f"{numbers} {first.name}{'' if len(members) == 1 else ' ...'}"
