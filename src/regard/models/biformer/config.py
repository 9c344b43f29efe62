"""The config of BiFormer."""

from __future__ import annotations

from dataclasses import dataclass

from regard.core.checks import check_choice, check_flag, check_integer, check_number, reject
from regard.models.vision import VisionConfig

KINDS = ("biformer", "stl")
LAYOUTS = ("nhwc", "nchw")


@dataclass(frozen=True)
class BiFormerConfig(VisionConfig):
    """Stages of bi-level routing attention, the last ones with full attention.

    topks: per stage: above 0, as many regions are routed to; -1 full attention (in layout "nchw"
        with a convolution of the values); -2 full attention and a convolution of what comes in
        (of the values in "nchw"); 0 convolutions alone.
    head_dim: of routed attention. full_heads: of full attention. qk_dims: of routed attention
        (None: dims). n_win: regions along each side. side_dwconv, pos_dwconv: sides of depthwise
        convolutions beside attention and before each block, 0 for none.
    kind: "biformer": overlapping 3 x 3 convolutions between stages; "stl": patches, blocks under
        `blocks`. layout: of the projections, see `regard.mixers.BiLevelRoutingAttention`; "nchw"
        is of kind "stl". padding: of it, too.
    mlp_dwconv: a 3 x 3 depthwise convolution in the perceptron. layer_scale: initial factor of
        each branch, 0 for none. pre_norm: norms before the branches, else after the sum.
    soft_routing, diff_routing, param_routing, kv_downsample, kv_per_wins: of routed attention;
        kv_per_wins has a number per stage (tokens a side, or the ratio).
    features_only: no head; the output is the map after every stage.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    mlp_ratios: tuple[float, ...] = (3, 3, 3, 3)
    topks: tuple[int, ...] = (1, 4, 16, -2)
    qk_dims: tuple[int, ...] | None = None
    head_dim: int = 32
    full_heads: int = 8
    n_win: int = 7
    side_dwconv: int = 5
    pos_dwconv: int = 3
    kind: str = "biformer"
    layout: str = "nhwc"
    padding: str | None = None
    mlp_dwconv: bool = False
    layer_scale: float = 0.0
    pre_norm: bool = True
    soft_routing: bool = False
    diff_routing: bool = False
    param_routing: bool = False
    kv_downsample: str = "identity"
    kv_per_wins: tuple[int, ...] | None = None
    features_only: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        self.per_stage("dims", "depths", "mlp_ratios")
        for name in ("qk_dims", "kv_per_wins"):
            if getattr(self, name) is not None:
                self.per_stage(name, stages=len(self.dims))
        if not isinstance(self.topks, tuple) or len(self.topks) != len(self.dims):
            raise reject(op, "topks", f"a tuple of {len(self.dims)} numbers", self.topks)
        for topk in self.topks:
            check_integer(op, "topks", topk, least=-2)
        for name in ("head_dim", "full_heads", "n_win"):
            check_integer(op, name, getattr(self, name))
        for name in ("side_dwconv", "pos_dwconv"):
            check_integer(op, name, getattr(self, name), least=0)
        check_choice(op, "kind", self.kind, KINDS)
        check_choice(op, "layout", self.layout, LAYOUTS)
        check_number(op, "layer_scale", self.layer_scale, least=0.0)
        for name in ("mlp_dwconv", "pre_norm", "features_only"):
            check_flag(op, name, getattr(self, name))
        stl = self.kind == "stl"
        if self.layout == "nchw" and not stl:
            raise reject(op, "layout", "'nhwc' with kind='biformer'", self.layout)
        for name in ("mlp_dwconv", "pos_dwconv", "layer_scale"):
            if stl and getattr(self, name):
                raise reject(op, name, "False or 0 with kind='stl'", getattr(self, name))
        if not stl and self.dims[0] % 2:
            raise reject(op, "dims", "even at first, as the stem begins with half of it", self.dims)
