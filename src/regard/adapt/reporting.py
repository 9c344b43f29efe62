"""Which layer of a model can take which mechanism, and why not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from regard.adapt.fitting import CARDS, find, refuses
from regard.adapt.site import Layers, Site, choose

FACTS = ("kind", "causal", "heads", "kv_heads", "head_dim", "window", "softcap")
EXTRAS = ("sinks", "position_bias")


@dataclass(frozen=True)
class Report:
    """The attention layers of a model, and for each mechanism -> the reason against it, or None."""

    model: str
    layers: tuple[Site, ...]
    reasons: tuple[dict[str, str | None], ...]
    swapped: tuple[str | None, ...]

    def can(self, mechanism: str) -> tuple[str, ...]:
        """The layers that can take it."""
        return tuple(site.name for site, why in self._items() if why[mechanism] is None)

    def only(self, mechanisms: Collection[str] | None = None, layers: Layers = None) -> Report:
        """The part about these mechanisms and layers (numbers, paths or patterns); None: all.

        Raises: ValueError, TypeError: an unknown name, a layer that the model does not have.
        """
        kept = {site.number for site in choose("report", self.layers, layers)}
        names = None if mechanisms is None else [find("report", name).name for name in mechanisms]
        rows = [
            (site, why if names is None else {name: why[name] for name in names}, now)
            for site, why, now in zip(self.layers, self.reasons, self.swapped, strict=True)
            if site.number in kept
        ]
        sites, reasons, swapped = zip(*rows, strict=True)
        return replace(self, layers=sites, reasons=reasons, swapped=swapped)

    def rows(self) -> list[tuple[str, str, str]]:
        """(layers, mechanism, "yes" or why not), layers of equal answers together."""
        answers = [(site.kind, tuple(why.items())) for site, why in self._items()]
        return [
            (names, name, "yes" if reason is None else f"no: {reason}")
            for names, (_, why) in _together(self.layers, answers)
            for name, reason in why
        ]

    def layer_rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """(layers, pattern, heads, channels of a head, window, what else), equal ones together."""
        facts = [(site.pattern.value, *_described(site)) for site in self.layers]
        return [(names, *row) for names, row in _together(self.layers, facts)]

    def _items(self) -> Iterable[tuple[Site, dict[str, str | None]]]:
        return zip(self.layers, self.reasons, strict=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        items = zip(self.layers, self.reasons, self.swapped, strict=True)
        return {
            "model": self.model,
            "layers": [
                {"number": site.number, "name": site.name, "pattern": site.pattern.value}
                | {fact: getattr(site, fact) for fact in FACTS}
                | {extra: getattr(site, extra) for extra in EXTRAS}
                | {"swapped": now, "mechanisms": why}
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


def _together(sites: tuple[Site, ...], rows: list[Any]) -> list[tuple[str, Any]]:
    """The different rows, each with the layers that have it."""
    groups: dict[Any, list[Site]] = {}
    for site, row in zip(sites, rows, strict=True):
        groups.setdefault(row, []).append(site)
    return [(_names(members), row) for row, members in groups.items()]


def _described(site: Site) -> tuple[str, str, str, str]:
    heads, size, window = (
        "-" if x is None else str(x) for x in (site.heads, site.head_dim, site.window)
    )
    if site.kv_heads != site.heads and site.kv_heads is not None:
        heads += f" on {site.kv_heads}"
    more = [name.replace("_", " ") for name in EXTRAS if getattr(site, name)]
    if site.softcap is not None:
        more.append(f"softcap {site.softcap:g}")
    return heads, size, window, ", ".join(more) or "-"


def _names(members: list[Site]) -> str:
    first, last = members[0], members[-1]
    numbers = str(first.number) if len(members) == 1 else f"{first.number}..{last.number}"
    if len(members) > 1 and last.number - first.number + 1 != len(members):
        numbers = ",".join(str(site.number) for site in members)
    return f"{numbers} {first.name}{'' if len(members) == 1 else ' ...'}"
