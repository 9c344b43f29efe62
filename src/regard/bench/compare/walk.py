"""Walking forward over a stretch: at every row a forecast from the pairs that are complete there.

A forecast made at row t for row t + h may use the pair (key_j, value_j = x[j + h]) only if
j + h <= t. Over all rows at once that is one strictly causal attention call with the masks
aligned at the end: `op(q, k[:, :, :-h], v[:, :, :-h], causal=True)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.tasks.series import Lagged, Pairs


@dataclass(frozen=True, eq=False)
class Walk:
    """One horizon over the target rows [start, stop): everything a forecaster may use.

    `queries` are the keys of the `origins` (the rows at which forecasts are made); the last of
    `pairs` is the last one that is complete at the last origin, so that query i, counted from
    the end, may see all pairs but the last i.
    """

    horizon: int
    start: int
    stop: int
    origins: Int[Tensor, " t"]
    queries: Float[Tensor, "t d"]
    pairs: Pairs
    base: Float[Tensor, " t"]
    truth: Float[Tensor, " t"]
    scored: Bool[Tensor, " t"]

    @classmethod
    def over(cls, data: Lagged, horizon: int, start: int, stop: int) -> Walk:
        """Forecasts of the rows [start, stop), each made `horizon` rows earlier."""
        origins = torch.arange(start, stop) - horizon
        return cls(
            horizon,
            start,
            stop,
            origins,
            data.keys[origins - data.lags],
            data.pairs(horizon, int(origins[-1]) + 1),
            data.base(origins),
            data.filled[start:stop],
            data.observed[start:stop],
        )

    def visible(self) -> Int[Tensor, " t"]:
        """How many pairs, from the first, each forecast may use."""
        total, count = len(self.pairs.values), len(self.origins)
        return (torch.arange(count) + total - count + 1).clamp(min=0)

    def forecasts(self, outputs: Float[Tensor, "... t"]) -> Float[Tensor, "... t"]:
        """Standardised outputs as values of the series."""
        return self.base + self.pairs.shift + self.pairs.scale * outputs.double()

    def rmse(self, forecasts: Float[Tensor, "... t"]) -> Float[Tensor, "*heads"]:
        """Root mean squared error over the measured rows; inf if a forecast is not finite."""
        errors = (forecasts - self.truth)[..., self.scored]
        return errors.square().mean(-1).sqrt().nan_to_num(nan=math.inf, posinf=math.inf)
