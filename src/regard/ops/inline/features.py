"""Feature maps that the authors' code offers; the published models use the identity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

RATE, SLOPE = 0.2, 0.01  # of the exponential and of the leaky map, as released
# From there on the exponential map is constant: products of two such features, and sums of them
# over any number of keys, stay in the range of float32.
HIGHEST = 40.0


def _exponential(x: Tensor) -> Tensor:
    return (RATE * x).clamp(max=HIGHEST).exp()


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": leaky_relu,
    "exp": _exponential,
}


def differentiate(name: str, x: Tensor, features: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x from that of `features` = phi(x), which it may overwrite."""
    if name == "relu":
        return torch.ops.aten.threshold_backward(gradient, x, 0.0)
    if name == "leaky_relu":
        return torch.where(x > 0, gradient, SLOPE * gradient)
    if name == "exp":
        return gradient.mul_(features).mul_(RATE).masked_fill_(RATE * x > HIGHEST, 0.0)
    return gradient
