"""Linked views of a vision model's heads: choose one, and everything shows that one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
CLASSES = 6  # shown of a model's classes, the likeliest first


def explorer(
    *,
    picture: str,
    layers: Sequence[int],
    heads: Sequence[int],
    metrics: dict[str, Array],
    profile: Array,
    heat: Array,
    query: str,
    whole: Array | None = None,
    without: Array | None = None,
    classes: Sequence[str] = (),
) -> str:
    """A part of a page, with its script and data: no server, no network.

    A matrix of heads coloured by a metric; the chosen head's weight by distance, its attention over
    the image, and the class probabilities with it and without it. The choice is in the address of
    the page, so that a link leads to it. At most one per page.

    Args:
        picture: the image, as a data URL.
        layers, heads: their numbers.
        metrics: name -> [L, H].
        profile: [L, H, K], weight on patches k hops away.
        heat: [L, H, rows, columns], attention to every patch.
        query: whose attention `heat` is, in words.
        whole: [C], probabilities of the model as it is; None: no classes.
        without: [L, H, C], those without each head.
        classes: their names.
    """
    shown = slice(0) if whole is None else np.argsort(-whole, kind="stable")[:CLASSES]
    chosen = None if whole is None or without is None else without[..., shown]
    data = {
        "picture": picture,
        "layers": list(layers),
        "heads": list(heads),
        "grid": heat.shape[2:],
        "metrics": {name: _short(values) for name, values in metrics.items()},
        "profile": _short(profile),
        "heat": _short(heat.reshape(*heat.shape[:2], -1), 3),
        "query": query,
        "whole": None if whole is None else _short(whole[shown], 6),
        "without": None if chosen is None else _short(chosen, 6),
        "classes": [str(name) for name in np.asarray(classes, dtype=object)[shown]],
    }
    # "<" would end the element in which the data stand.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = files("regard.bench.inspecting") / "templates" / "explorer.html"
    return Template(template.read_text(encoding="utf-8")).substitute(data=text)


def _short(values: Array, digits: int = 4) -> Any:
    if values.ndim:
        return [_short(part, digits) for part in values]
    return float(f"{float(values):.{digits}g}") if np.isfinite(values) else None
