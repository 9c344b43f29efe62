"""Untrained predictors of a stream by every mechanism, with the settings that are tuned.

A predictor sees x_t and the pairs before t. Settings are chosen on streams of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from regard import ops
from regard.tasks import (
    PiecewiseRegression,
    RegressionScore,
    evaluate_test_time_regression,
    strictly_causal,
)
from regard.tasks.piecewise import Predictor

BANDWIDTHS = (0.15, 0.3, 0.5, 1.0, 2.0)  # of the kernel, in units of sqrt(d)
RIDGES = (0.1, 1.0, 10.0)
DECAYS = (0.9, 0.95, 0.98, 0.99)


def softmax(d: int, h: float) -> Predictor:
    """A local average."""
    return strictly_causal(ops.softmax_attention, scale=1 / (h * math.sqrt(d)))


def local_linear(d: int, h: float, ridge: float) -> Predictor:
    """A local affine fit."""
    return strictly_causal(ops.local_linear_attention, scale=1 / (h * math.sqrt(d)), ridge=ridge)


def mesa(d: int, ridge: float, decay: float = 1.0) -> Predictor:
    """The ridge regression of all pairs, older ones counting less."""

    def predict(x: Tensor, y: Tensor) -> Tensor:
        forget = None
        if decay < 1:
            forget = x.new_full((x.shape[0], 1, x.shape[1] - 1), math.log(decay))
        return strictly_causal(ops.mesa_attention, log_decay=forget, ridge=ridge)(x, y)

    return predict


def delta(d: int, step: float) -> Predictor:
    """One gradient step a pair, on keys of norm 1."""

    def predict(x: Tensor, y: Tensor) -> Tensor:
        beta = x.new_full((x.shape[0], 1, x.shape[1] - 1), step)
        return strictly_causal(ops.delta_attention, beta=beta)(x, y)

    return predict


@dataclass(frozen=True)
class Family:
    """A maker of predictors, called with the dimension and one value of every grid."""

    make: Callable[..., Predictor]
    grids: tuple[tuple[float, ...], ...]

    def members(self, d: int) -> Iterator[tuple[tuple[float, ...], Predictor]]:
        """(settings, predictor) of all."""
        for settings in product(*self.grids):
            yield settings, self.make(d, *settings)


FAMILIES = {
    "local linear": Family(local_linear, (BANDWIDTHS, (1e-3, 1e-2, 0.1))),
    "softmax": Family(softmax, (BANDWIDTHS,)),
    "mesa": Family(mesa, (RIDGES,)),
    "mesa, decay": Family(mesa, (RIDGES, DECAYS)),
    "delta": Family(delta, ((0.3, 0.6, 1.0),)),
}
BASELINE = "local linear"


def tuned_scores(
    d: int,
    segment: int,
    length: int,
    mode: Literal["cluster", "iid"] = "cluster",
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    tuning: int = 4,
    test: int = 8,
) -> dict[str, dict[str, Any]]:
    """The tuned member of every family on streams it was not tuned on, in float64.

    `tuning` and `test` are numbers of streams. Returns, by family: "error" (mean squared error
    over mean squared target), "ratio" to local linear, "settings", and curves "by_position" and
    "in_segment" (over the whole segments after the first).

    >>> found = tuned_scores(3, 8, 24, tuning=1, test=1)
    >>> sorted(found["softmax"])
    ['by_position', 'error', 'in_segment', 'ratio', 'settings']
    """
    task = PiecewiseRegression(d, segment, length, mode)
    made = torch.Generator(device).manual_seed(seed)
    before, after = task.sample(tuning, made), task.sample(test, made)
    chosen: dict[str, Predictor] = {}
    settings: dict[str, tuple[float, ...]] = {}
    for name, family in FAMILIES.items():
        members = dict(family.members(d))
        scores = evaluate_test_time_regression(
            {str(values): predict for values, predict in members.items()}, before
        )
        settings[name] = min(members, key=lambda values, s=scores: s[str(values)].error)
        chosen[name] = members[settings[name]]
    found = evaluate_test_time_regression(chosen, after, baseline=BASELINE)
    return {name: {**_plain(score), "settings": settings[name]} for name, score in found.items()}


def _plain(score: RegressionScore) -> dict[str, Any]:
    return {
        "error": score.error,
        "ratio": score.ratio,
        "by_position": score.by_position.tolist(),
        "in_segment": score.in_segment.tolist(),
    }
