"""What to judge mechanisms on: data and metrics, no models."""

from __future__ import annotations

from regard.tasks.piecewise import (
    PiecewiseRegression,
    RegressionScore,
    Stream,
    evaluate_test_time_regression,
    normalised_error,
    strictly_causal,
)

__all__ = [
    "PiecewiseRegression",
    "RegressionScore",
    "Stream",
    "evaluate_test_time_regression",
    "normalised_error",
    "strictly_causal",
]
