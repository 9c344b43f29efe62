"""Functions of (q, k, v): every mechanism is a folder, every folder has one card."""

from regard.ops.delta import delta_attention
from regard.ops.gated_delta import gated_delta_attention
from regard.ops.linear import linear_attention
from regard.ops.local_linear import (
    flash_lla,
    local_linear_attention,
    local_linear_slope,
    local_linear_weights,
)
from regard.ops.mesa import mesa_attention
from regard.ops.parallax import parallax_attention
from regard.ops.softmax import softmax_attention

__all__ = [
    "delta_attention",
    "flash_lla",
    "gated_delta_attention",
    "linear_attention",
    "local_linear_attention",
    "local_linear_slope",
    "local_linear_weights",
    "mesa_attention",
    "parallax_attention",
    "softmax_attention",
]
