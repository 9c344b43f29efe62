"""Arguments of readers: arrays of any kind, and modules that may not be installed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.core.checks import reject


def require(module: str, extra: str) -> Any:
    """An optional module, or an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{package} is needed here and cannot be imported ({error}): "
            f"pip install 'regard[{extra}]'"
        ) from error


def tensor(operation: str, argument: str, value: Any, *, axes: int, more: bool = False) -> Tensor:
    """`value` as a tensor of floating point with `axes` axes, or more of them.

    Raises:
        TypeError: it is nothing array-like.
        ValueError: it has another number of axes.
    """
    try:
        made = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise reject(operation, argument, "an array", value, kind=TypeError) from None
    if made.dim() < axes or (made.dim() > axes and not more):
        wanted = f"an array of {axes}{' or more' if more else ''} axes"
        raise reject(operation, argument, wanted, made)
    return made if made.is_floating_point() else made.float()


def array(values: Any) -> np.ndarray:
    """A NumPy array of a tensor, wherever it lies, or of anything array-like."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)
