"""Choosing hyper-parameters on the validation stretch.

A kernel compares keys, and the keys are the same at every horizon: so one setting is chosen
per mechanism, by the geometric mean of its errors over the horizons, which weighs a percent at
one horizon like a percent at another. What is handed in ends where the test stretch begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from regard.bench.compare.regressor import predict
from regard.bench.compare.walk import Walk
from regard.core.card import Card


@dataclass(frozen=True)
class Tried:
    """One setting and its error on the validation stretch; ordered by error."""

    error: float
    scale: float | None
    options: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All parameters by name."""
        return self.options if self.scale is None else {"scale": self.scale, **self.options}

    def __lt__(self, other: Tried) -> bool:
        return self.error < other.error


@dataclass(frozen=True)
class Choice:
    """The setting of a mechanism, and how it was found.

    `scale` is in multiples of the default scale, None if the card does not tune it; `edges`
    names the parameters whose best value is the outermost that was tried.
    """

    scale: float | None
    options: dict[str, Any]
    validation: float
    tried: int
    edges: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """All chosen parameters by name."""
        return self.options if self.scale is None else {"scale": self.scale, **self.options}

    @property
    def scales(self) -> tuple[float] | None:
        """The argument of `predict`."""
        return None if self.scale is None else (self.scale,)


FLAT = 0.005
LEAST = 1e-12  # a perfect forecast has a logarithm, too
Scales = tuple[float, ...] | None


def grid(card: Card) -> tuple[Scales, list[dict[str, Any]]]:
    """The scales (they run as heads of one call) and every combination of the other options."""
    names = [name for name in card.tune if name != "scale"]
    scales = tuple(card.tune["scale"]) if "scale" in card.tune else None
    combinations = product(*(card.tune[name] for name in names))
    return scales, [dict(zip(names, values, strict=True)) for values in combinations]


def finer(card: Card, choice: Tried | Choice) -> tuple[Scales, list[dict[str, Any]]]:
    """The settings around a choice: half steps from one neighbour on the grid to the other for
    every positive number, and two whole steps beyond the end where the choice lies there. None
    on a grid of numbers, doing without, has nothing around it."""
    around = {name: _around(card.tune[name], value) for name, value in choice.settings.items()}
    scales = None if choice.scale is None else tuple(around.pop("scale"))
    combinations = product(*around.values())
    return scales, [dict(zip(around, values, strict=True)) for values in combinations]


def _around(values: Sequence[Any], chosen: Any) -> list[Any]:
    steps = _ladder(values)
    if not steps or chosen is None:
        return [chosen]
    at = steps.index(chosen)
    down = chosen / steps[at - 1] if at > 0 else steps[1] / steps[0]
    up = steps[at + 1] / chosen if at + 1 < len(steps) else steps[-1] / steps[-2]
    found = [chosen / down, chosen / down**0.5, chosen, chosen * up**0.5, chosen * up]
    if at == 0:
        found = [chosen / down**2, *found]
    if at == len(steps) - 1:
        found = [*found, chosen * up**2]
    return found


def _ladder(values: Sequence[Any]) -> list[float]:
    """The numbers of a grid of three or more different positive floats (and None), in order."""
    steps = {value for value in values if isinstance(value, float) and value > 0}
    others = [value for value in values if value not in steps and value is not None]
    return [] if others or len(steps) < 3 or len(set(values)) < len(values) else sorted(steps)


def calls(card: Card, walks: int) -> int:
    """How many calls of the op `tune` makes on the card's own grid: what a progress bar needs."""
    return walks * len(grid(card)[1])


def tune(
    card: Card,
    walks: Sequence[Walk],
    yardsticks: Sequence[float],
    dtype: torch.dtype = torch.float32,
    step: Callable[[float], None] = lambda share: None,
) -> Choice:
    """The setting with the least geometric mean of error / yardstick over the horizons' walks.

    First the card's grid, then once the finer grid around the best of it, then the middle of
    all settings that came within half a percent of the best: an optimum is flat, and where in
    it the lowest point lies is chance. `step(share)` is called with the share of the work that
    a call was.
    """
    found: list[Tried] = []

    def search(settings: tuple[Scales, list[dict[str, Any]]], share: float) -> None:
        scales, combinations = settings
        for options in combinations:
            total = torch.zeros(len(scales or (1.0,)), dtype=torch.float64)
            for walk, yardstick in zip(walks, yardsticks, strict=True):
                outputs = predict(card, walk, scales, options, dtype)
                total += (walk.rmse(walk.forecasts(outputs)) / yardstick).clamp(min=LEAST).log()
                step(share / (len(combinations) * len(walks)))
            means = (total / len(walks)).exp().tolist()
            found.extend(
                Tried(error, scale, options)
                for scale, error in zip(scales or (None,), means, strict=True)
            )
        if min(found).error == float("inf"):
            raise ArithmeticError("no setting of its grid gave finite forecasts on validation")

    search(grid(card), 0.5)
    search(finer(card, min(found)), 0.45)
    search(_middle(card, found), 0.05)
    best = min(found)
    edges = tuple(name for name, value in best.settings.items() if _at_end(card, name, value))
    different = {tuple(tried.settings.items()) for tried in found}
    return Choice(best.scale, best.options, best.error, len(different), edges)


def _middle(card: Card, found: Sequence[Tried]) -> tuple[Scales, list[dict[str, Any]]]:
    """One setting: for every number the geometric mean over those that did about as well."""
    best = min(found)
    ladders = {
        name
        for name, value in best.settings.items()
        if value is not None and _ladder(card.tune[name])
    }
    near = {
        tuple(tried.settings.items()): tried.settings
        for tried in found
        if tried.error <= best.error * (1 + FLAT)
        and all(tried.settings[name] == best.settings[name] for name in {*best.settings} - ladders)
        and all(tried.settings[name] is not None for name in ladders)
    }
    middle = {
        name: math.exp(sum(math.log(one[name]) for one in near.values()) / len(near))
        if name in ladders
        else value
        for name, value in best.settings.items()
    }
    scales = None if best.scale is None else (middle.pop("scale"),)
    return scales, [middle]


def _at_end(card: Card, name: str, value: Any) -> bool:
    """Whether a value is the outermost that was tried, so that a better one may lie beyond."""
    values = _ladder(card.tune[name])
    if not values or value is None:
        return False
    outer = _around(values, values[0])[0], _around(values, values[-1])[-1]
    return value <= outer[0] or value >= outer[1]
