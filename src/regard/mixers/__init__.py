"""Layers that mix tokens, x -> x, with projections of their own.

`Attention` takes any mechanism that has a card; `LocalLinear` learns the ridge and bandwidth of
local linear attention; `Mesa` and `Parallax` are the layers of their papers. `ShortConvolution`,
`RMSNorm`, `UnitNorm` and `rotate` are their pieces.
"""

from regard.mixers.attention import Attention
from regard.mixers.convolution import ShortConvolution
from regard.mixers.local_linear import LocalLinear
from regard.mixers.mesa import Mesa
from regard.mixers.norms import RMSNorm, UnitNorm
from regard.mixers.parallax import Parallax
from regard.mixers.positions import rotate

__all__ = [
    "Attention",
    "LocalLinear",
    "Mesa",
    "Parallax",
    "RMSNorm",
    "ShortConvolution",
    "UnitNorm",
    "rotate",
]
