"""Layers that mix tokens, x -> x, with projections of their own.

`Attention` takes any mechanism that has a card; `LocalLinear` learns the ridge and bandwidth of
local linear attention. `ShortConvolution`, `RMSNorm` and `rotate` are pieces of both.
"""

from regard.mixers.attention import Attention
from regard.mixers.convolution import ShortConvolution
from regard.mixers.local_linear import LocalLinear
from regard.mixers.norms import RMSNorm
from regard.mixers.positions import rotate

__all__ = ["Attention", "LocalLinear", "RMSNorm", "ShortConvolution", "rotate"]
