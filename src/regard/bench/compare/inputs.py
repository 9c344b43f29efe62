"""Whatever a caller holds, as a `Series`."""

from __future__ import annotations

import os
from typing import Any

import torch

from regard.core.checks import reject
from regard.tasks.series import Series, load_series


def as_series(value: Any, column: str | None = None) -> Series:
    """A `Series` as it is, a data set's name, a CSV file's path, or numbers in time order,
    where None and NaN are gaps."""
    if isinstance(value, Series):
        return value
    if isinstance(value, str | os.PathLike):
        return load_series(os.fspath(value), column)
    if column is not None:
        raise reject("compare", "column", "None unless the series is a CSV file", column)
    if isinstance(value, list | tuple):
        value = [float("nan") if number is None else number for number in value]
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        accepted = "a name, a path, or numbers in time order"
        raise reject("compare", "series", accepted, value, kind=TypeError) from error
    if numbers.dim() != 1:
        raise reject("compare", "series", "one-dimensional", numbers)
    if bool(numbers.isinf().any()):
        raise reject("compare", "series", "finite (NaN marks a gap)", numbers)
    return Series("series", numbers)
