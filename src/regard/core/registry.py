"""`regard.mechanisms`: a lazy mapping from a mechanism's name to its card."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from regard.core.card import Card
from regard.core.checks import describe, nearest

GROUP = "regard.mechanisms"


class UnknownMechanism(KeyError):
    """No card of that name; the message offers the nearest one."""

    def __str__(self) -> str:
        return self.args[0]


class Mechanisms(Mapping[str, Card]):
    """Cards by name: the folders of a package that hold a `card.py`, and installed entry points.

    Listing the names imports nothing; asking for a card imports its folder, once. A third
    party adds a mechanism with an entry point of the group `regard.mechanisms` whose value is
    a `Card`. Two mechanisms of one name raise when that name is asked for.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._cards: dict[str, Card] = {}
        self._places: dict[str, list[EntryPoint]] | None = None

    def _find(self) -> dict[str, list[EntryPoint]]:
        """The places of every name; more than one is a clash."""
        if self._places is None:
            places: dict[str, list[EntryPoint]] = {}
            spec = find_spec(self._package)
            for root in (spec.submodule_search_locations if spec is not None else None) or ():
                for module in pkgutil.iter_modules([root]):
                    if module.ispkg and (Path(root) / module.name / "card.py").exists():
                        value = f"{self._package}.{module.name}.card:card"
                        places[module.name] = [EntryPoint(module.name, value, GROUP)]
            for point in entry_points(group=GROUP):
                known = places.setdefault(point.name, [])
                if point.value not in [other.value for other in known]:
                    known.append(point)
            self._places = dict(sorted(places.items()))
        return self._places

    def __getitem__(self, name: str) -> Card:
        if name not in self._cards:
            self._cards[name] = self._load(name)
        return self._cards[name]

    def _load(self, name: str) -> Card:
        places = self._find()
        if name not in places:
            hint, known = nearest(name, places), ", ".join(places)
            raise UnknownMechanism(f"no mechanism is called {name!r}{hint} (known: {known})")
        place, *others = places[name]
        if others:
            listed = ", ".join(point.value for point in places[name])
            raise ValueError(f"several mechanisms are called {name!r}: {listed}")
        try:
            card = place.load()
        except Exception as error:
            error.add_note(f"while loading the mechanism {name!r} from {place.value}")
            raise
        if not isinstance(card, Card):
            found = describe(card)
            raise TypeError(f"mechanism {name!r}: {place.value} must be a Card, got {found}")
        if card.name != name:
            raise TypeError(f"mechanism {name!r}: {place.value} is the Card {card.name!r}")
        return card

    def __iter__(self) -> Iterator[str]:
        return iter(self._find())

    def __len__(self) -> int:
        return len(self._find())

    def __contains__(self, name: object) -> bool:
        return name in self._find()

    def __repr__(self) -> str:
        return f"Mechanisms({', '.join(self._find())})"
