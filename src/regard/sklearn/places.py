"""Training rows made ready for a fit: standardised, and equal rows joined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scaling:
    """Weighted mean and standard deviation of every column; 1 for a constant column."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, weights: np.ndarray) -> Scaling:
        share = weights / weights.sum()
        mean = share @ rows
        deviation = np.sqrt(share @ np.square(rows - mean))
        # What rounding alone makes of a constant column counts as constant.
        noise = 10 * np.finfo(rows.dtype).eps * np.abs(rows).max(0)
        return cls(mean, np.where(deviation > noise, deviation, 1.0))

    def apply(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.mean) / self.deviation


@dataclass(frozen=True)
class Places:
    """Rows with equal features as one place: its total weight, mean value and spread of values.

    A local linear fit cannot tell the difference, and leaving out a place leaves out what would
    otherwise give it away. So a weight of 2 is the same as a row that is there twice.
    """

    features: np.ndarray  # [n, D], distinct rows in a fixed order
    values: np.ndarray  # [n, p], weighted means
    weights: np.ndarray  # [n]
    spread: np.ndarray  # [n, p], sum of weight (value - mean)^2

    @classmethod
    def of(cls, features: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Places:
        distinct, place = np.unique(features, axis=0, return_inverse=True)
        place = place.reshape(-1)

        def total(x: np.ndarray) -> np.ndarray:
            columns = [np.bincount(place, column, len(distinct)) for column in x.T]
            return np.stack(columns, 1)

        sums = total(weights[:, None])
        mean = total(weights[:, None] * values) / sums
        spread = total(weights[:, None] * np.square(values - mean[place]))
        return cls(distinct, mean, sums[:, 0], spread)

    def select(self, rows: np.ndarray) -> Places:
        """These places, in this order."""
        return Places(*(x[rows] for x in (self.features, self.values, self.weights, self.spread)))
