"""Layers that mix tokens, x -> x, with projections of their own.

`Attention` takes any mechanism that has a card; `LocalLinear` learns the ridge and bandwidth of
local linear attention; `Mesa`, `Parallax` and `Rat` are the layers of their papers.
`ShortConvolution`, `RMSNorm`, `UnitNorm` and `rotate` are their pieces.
"""

from regard.mixers.attention import Attention
from regard.mixers.boundaries import BoundaryPredictor
from regard.mixers.convolution import ShortConvolution
from regard.mixers.feature_maps import ELU1, HedgehogFeatureMap, T2RFeatureMap
from regard.mixers.halo import HaloAttention, ProjectedHaloAttention
from regard.mixers.hedgehog import Hedgehog
from regard.mixers.inline import InLineAttention, LocalResidual2d
from regard.mixers.local_linear import LocalLinear
from regard.mixers.mesa import Mesa
from regard.mixers.norms import RMSNorm, UnitNorm
from regard.mixers.parallax import Parallax
from regard.mixers.positions import rotate
from regard.mixers.pyramid_sparse import PyramidSparseAttention
from regard.mixers.rat import GatedRNN, Rat
from regard.mixers.relu_linear import LinearGlobalAttention, LocalConcentration2d
from regard.mixers.routed import BiLevelRoutingAttention
from regard.mixers.ssa import AlignmentLoss, SSAAttention
from regard.mixers.tnl import TnlAttention
from regard.mixers.window import WindowAttention2d

__all__ = [
    "ELU1",
    "AlignmentLoss",
    "Attention",
    "BiLevelRoutingAttention",
    "BoundaryPredictor",
    "GatedRNN",
    "HaloAttention",
    "Hedgehog",
    "HedgehogFeatureMap",
    "InLineAttention",
    "LinearGlobalAttention",
    "LocalConcentration2d",
    "LocalLinear",
    "LocalResidual2d",
    "Mesa",
    "Parallax",
    "ProjectedHaloAttention",
    "PyramidSparseAttention",
    "RMSNorm",
    "Rat",
    "SSAAttention",
    "ShortConvolution",
    "T2RFeatureMap",
    "TnlAttention",
    "UnitNorm",
    "WindowAttention2d",
    "rotate",
]
