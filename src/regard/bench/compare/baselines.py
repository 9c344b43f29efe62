"""What any method must beat: the last value, the last season, and ridge autoregression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regard.bench.compare.walk import Walk
from regard.tasks.series import Lagged

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def last_value(data: Lagged, walk: Walk) -> Float[Tensor, " t"]:
    """x[t] for x[t + h]: no change."""
    return data.filled[walk.origins]


def seasonal_naive(data: Lagged, walk: Walk, season: int) -> Float[Tensor, " t"]:
    """The value one season (or as many as the horizon needs) before the target."""
    seasons = -(-walk.horizon // season)
    rows = torch.arange(walk.start, walk.stop) - season * seasons
    return data.filled[rows.clamp(min=0)]


def find_season(past: Float[Tensor, " n"], least: float = 0.2) -> int | None:
    """The period of a series: the highest peak of its autocorrelation, if it stands out.

    A parabola is taken off first. A peak is a lag from 2 to a third of the rows that is higher
    than its neighbours, comes after the correlation has first been negative, and is at least
    `least`.

    >>> find_season(torch.sin(torch.arange(200.0) * 2 * torch.pi / 12))
    12
    """
    n = len(past)
    time = torch.linspace(-1, 1, n, dtype=torch.float64)
    powers = torch.stack([time**0, time, time**2], 1)
    parabola = powers @ torch.linalg.lstsq(powers, past.double()[:, None]).solution
    rest = past.double() - parabola[:, 0]
    spectrum = torch.fft.rfft(rest, n=2 * n).abs().square()
    correlation = torch.fft.irfft(spectrum, n=2 * n)[: n // 3 + 1]
    if len(correlation) < 4 or correlation[0] <= 0:
        return None
    correlation = correlation / correlation[0]
    negative = (correlation < 0).nonzero().flatten()
    if len(negative) == 0:
        return None
    inner = correlation[1:-1]
    peak = (inner >= correlation[:-2]) & (inner > correlation[2:]) & (inner >= least)
    peak[: int(negative[0])] = False
    if not bool(peak.any()):
        return None
    return int(torch.where(peak, inner, -1.0).argmax()) + 1


@dataclass(frozen=True)
class AutoRegression:
    """Ridge regression on the same keys and values, one per horizon, refitted at every forecast.

    b_t = argmin sum_j (y_j - b . [key_j, 1])^2 + ridge |b without the constant|^2 over the pairs
    that are complete at t: exactly those that a mechanism sees there.
    """

    ridge: float

    def predict(self, walk: Walk) -> tuple[Float[Tensor, " t"], Float[Tensor, "t d"]]:
        """Standardised forecasts, and the coefficients of the keys at every forecast."""
        keys, queries = _with_one(walk.pairs.keys), _with_one(walk.queries)
        weight = walk.pairs.real.to(keys.dtype)[:, None]
        values = walk.pairs.values[:, None]
        size = keys.shape[1]
        penalty = torch.full((size,), self.ridge, dtype=keys.dtype)
        penalty[-1] = 1e-9  # no pair at all: the constant is 0
        visible = walk.visible()
        rows = max(1, 2**22 // size**2)  # 32 MiB of Gram matrices at a time
        coefficients = torch.zeros(len(queries), size, dtype=keys.dtype)
        done, gram = 0, torch.diag(penalty)
        moment = torch.zeros(size, 1, dtype=keys.dtype)
        for at in range(0, len(queries), rows):
            here = visible[at : at + rows]
            first, last = int(here[0]), int(here[-1])
            new, old = slice(done, first), slice(first, last)
            gram = gram + keys[new].T @ (weight[new] * keys[new])
            moment = moment + keys[new].T @ (weight[new] * values[new])
            grams = (keys[old] * weight[old])[:, :, None] * keys[old][:, None, :]
            moments = (keys[old] * weight[old] * values[old])[:, :, None]
            grams = torch.cat([gram[None], gram + grams.cumsum(0)])
            moments = torch.cat([moment[None], moment + moments.cumsum(0)])
            coefficients[at : at + rows] = torch.linalg.solve(
                grams[here - first], moments[here - first]
            )[:, :, 0]
            gram, moment, done = grams[-1], moments[-1], last
        return (coefficients * queries).sum(1), coefficients[:, :-1]

    @staticmethod
    def tuned(walks: Sequence[Walk], yardsticks: Sequence[float]) -> tuple[AutoRegression, float]:
        """The ridge with the least geometric mean of error / yardstick, and that mean."""
        found = []
        for ridge in RIDGES:
            model, total = AutoRegression(ridge), 0.0
            for walk, yardstick in zip(walks, yardsticks, strict=True):
                error = float(walk.rmse(walk.forecasts(model.predict(walk)[0])))
                total += math.log(max(error / yardstick, 1e-12))
            found.append((math.exp(total / len(walks)), ridge))
        error, ridge = min(found)
        return AutoRegression(ridge), error


def _with_one(keys: Float[Tensor, "n d"]) -> Float[Tensor, "n d1"]:
    return torch.cat([keys, torch.ones(len(keys), 1, dtype=keys.dtype)], 1)
