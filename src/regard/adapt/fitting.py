"""Which mechanism fits into which layer, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from regard.adapt.learned import lacks
from regard.adapt.site import Site
from regard.core.card import Card
from regard.core.checks import nearest, reject, words
from regard.core.registry import Mechanisms
from regard.mixers.arguments import taken
from regard.mixers.operands import check_operand

CARDS = Mechanisms("regard.ops")
DROPPABLE = ("window", "softcap", "sinks", "position_bias")


def find(op: str, mechanism: str | Card) -> Card:
    """The card that was named or given."""
    if isinstance(mechanism, Card):
        return mechanism
    if not isinstance(mechanism, str):
        accepted = "the name of a mechanism or a Card"
        raise reject(op, "mechanism", accepted, mechanism, kind=TypeError)
    if mechanism not in CARDS:
        accepted = f"one of {', '.join(CARDS)}"
        got = words(repr(mechanism) + nearest(mechanism, CARDS))
        raise reject(op, "mechanism", accepted, got)
    return CARDS[mechanism]


def fits(card: Card) -> bool:
    """Whether a layer of a model can give the mechanism what it needs."""
    try:
        for operand in card.operands:
            check_operand("swap", operand)
    except ValueError:
        return False
    return not _has_fixed_grid(card)


def _has_fixed_grid(card: Card) -> bool:
    """Ops whose plan, if not an operand, is a required argument of theirs."""
    known = {"q", "k", "v", *(operand.name for operand in card.operands)}
    parameters: Any = inspect.signature(card.op).parameters.values()
    return any(p.default is p.empty and p.name not in known for p in parameters)


def refuses(card: Card, site: Site, drop: Collection[str] = ()) -> str | None:
    """Why a layer cannot take a mechanism, or None."""
    if not fits(card):
        return "it needs a plan (which keys, in which order) that no layer of a model makes"
    if site.pattern not in card.patterns:
        served = ", ".join(pattern.value for pattern in card.patterns)
        return f"the layer is {site.pattern.value}, and the mechanism serves {served}"
    has = {
        "window": site.window is not None,
        "softcap": site.softcap is not None,
        "sinks": site.sinks,
        "position_bias": site.position_bias,
    }
    takes = taken(card)
    for name, present in has.items():
        argument = "bias" if name == "position_bias" else name
        own = card.name == "window" and name == "window"
        if present and name not in drop and (argument not in takes or own):
            value = {"window": site.window, "softcap": site.softcap}.get(name)
            shown = f"a {name} of {value:g}" if value is not None else name
            return f"the layer has {shown}, and the op no {argument} (drop={name!r} forgets it)"
    if "window" in drop and site.window is not None and card.state != "fixed" and site.causal:
        return "the model's cache forgets keys outside of its window, which cannot be dropped then"
    return lacks(card, site)


def check_dropped(op: str, drop: Any) -> tuple[str, ...]:
    """`drop` as names."""
    names = (drop,) if isinstance(drop, str) else drop
    if not isinstance(names, tuple | list | set | frozenset):
        raise reject(op, "drop", "a name or several", drop, kind=TypeError)
    for name in names:
        if name not in DROPPABLE:
            raise reject(op, "drop", f"of {', '.join(map(repr, DROPPABLE))}", name)
    return tuple(names)
