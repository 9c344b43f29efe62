"""What to judge mechanisms on: data and metrics, no models."""

from __future__ import annotations

from regard.tasks.in_context import InContextRegression
from regard.tasks.piecewise import (
    PiecewiseRegression,
    RegressionScore,
    Stream,
    evaluate_test_time_regression,
    normalised_error,
    strictly_causal,
)
from regard.tasks.recall import MQAR, official_draws
from regard.tasks.task import Sample, Task
from regard.tasks.tracking import GroupWord, SwapTracking

__all__ = [
    "MQAR",
    "GroupWord",
    "InContextRegression",
    "PiecewiseRegression",
    "RegressionScore",
    "Sample",
    "Stream",
    "SwapTracking",
    "Task",
    "evaluate_test_time_regression",
    "normalised_error",
    "official_draws",
    "strictly_causal",
]
