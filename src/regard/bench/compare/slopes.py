"""The local map that local linear attention finds at each forecast."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

import regard
from regard.bench.compare.regressor import arguments, operands
from regard.bench.compare.result import LLA
from regard.bench.compare.tuning import Choice
from regard.bench.compare.walk import Walk


def local_slopes(walk: Walk, choice: Choice) -> Float[Tensor, "t d"]:
    """d forecast / d window, both standardised: the slope of the affine fit around each query."""
    from regard.ops.local_linear import local_linear_slope

    q, k, v, mask = operands(walk, torch.float64)
    named = arguments(regard.mechanisms[LLA], k, choice.scales, choice.options)
    if mask is not None:
        named["key_mask"] = mask
    with torch.no_grad():
        return local_linear_slope(q, k, v, **named)[0, 0, :, 0]
