"""Choosing bandwidth and ridge by leave-one-out error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product

# The grid, in half-steps: bandwidths are sqrt(D) 2^(b/2), as two standardised rows are about
# sqrt(2 D) apart, and ridges 10^(r/2). The largest bandwidth makes a global linear fit, the
# largest ridge a local average.
BANDWIDTHS = range(6, -9, -2)  # sqrt(D) times 8 to 1/16
RIDGES = range(2, -9, -2)  # 10 to 1e-4
ROUNDS = 4
TIE = 1e-3  # errors this close say nothing; a larger ridge is the safer fit

Step = tuple[int, int]


@dataclass
class Search:
    """Tries settings and keeps their errors.

    A bandwidth or ridge that is given stays as it is.
    """

    error: Callable[[float, float], float]
    features: int
    bandwidth: float | None
    ridge: float | None
    tried: dict[Step, float] = field(default_factory=dict)

    def run(self) -> Search:
        """The grid, then half-steps around the best setting until it stays the best."""
        self._try(BANDWIDTHS, RIDGES)
        for _ in range(ROUNDS):
            b, r = best = self.best
            self._try((b + 1, b, b - 1), (r + 1, r, r - 1))
            if self.best == best:
                break
        return self

    @property
    def best(self) -> Step:
        """Of the steps within `TIE` of the least error, the one of the largest ridge."""
        least = min(self.tried.values(), default=0.0) * (1 + TIE)
        near = [step for step, error in self.tried.items() if error <= least]
        smoothest = BANDWIDTHS[0], RIDGES[0]
        return max(near, key=lambda step: (step[1], step[0]), default=smoothest)

    def setting(self, step: Step) -> tuple[float, float]:
        """Bandwidth and ridge."""
        b, r = step
        bandwidth = math.sqrt(self.features) * 2.0 ** (b / 2)
        return self.bandwidth or bandwidth, self.ridge or 10.0 ** (r / 2)

    def _try(self, bandwidths: Iterable[int], ridges: Iterable[int]) -> None:
        bandwidths = bandwidths if self.bandwidth is None else (0,)
        ridges = ridges if self.ridge is None else (0,)
        for step in product(bandwidths, ridges):
            if step not in self.tried:
                error = self.error(*self.setting(step))
                self.tried[step] = error if math.isfinite(error) else math.inf
