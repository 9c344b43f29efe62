"""BiFormer: stages of bi-level routing attention.

Source: Zhu et al. 2023, arXiv 2303.08810, https://github.com/rayleizhu/BiFormer (MIT); written
from the equations and the shapes of its checkpoints, matched to its outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from regard.core.checks import reject
from regard.mixers.routed import BiLevelRoutingAttention
from regard.models.biformer.config import BiFormerConfig
from regard.models.vision import Classifier, DropPath, as_map, drop_rates


def channels_first(x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
    """The same numbers."""
    return x.permute(0, 3, 1, 2)


class OnMap(nn.Module):
    """A depthwise convolution, on a map with the channels last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        return as_map(self.dwconv(channels_first(x)))


class FullAttention(nn.Module):
    """Softmax attention of all tokens of a map to all, and a convolution beside it.

    beside: "input" adds a depthwise convolution of x, "values" one of the values, None nothing.
    """

    def __init__(
        self, dim: int, heads: int, beside: str | None, side_dwconv: int, first: bool
    ) -> None:
        super().__init__()
        if dim % heads:
            raise reject("FullAttention", "full_heads", f"a divisor of {dim}", heads)
        self.heads, self.beside, self.first = heads, beside, first
        if first:
            self.qkv: nn.Module = nn.Conv2d(dim, 3 * dim, 1, bias=False)
            self.proj: nn.Module = nn.Conv2d(dim, dim, 1)
        else:
            self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.lepe = None
        if beside is not None and side_dwconv:
            self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)

    def forward(self, x: Float[Tensor, "b i j k"]) -> Float[Tensor, "b i j k"]:
        """The same shape; channels first if `first`."""
        image = x if self.first else channels_first(x)
        qkv = self.qkv(x) if self.first else channels_first(self.qkv(x))
        B, C, h, w = image.shape
        q, k, v = qkv.view(B, 3, self.heads, -1, h * w).transpose(3, 4).unbind(1)
        y = scaled_dot_product_attention(q, k, v)
        y = y.transpose(2, 3).reshape(B, C, h, w)
        if self.lepe is not None:
            y = y + self.lepe(image if self.beside == "input" else qkv[:, 2 * C :])
        return self.proj(y if self.first else as_map(y))


class Convolutions(nn.Sequential):
    """Two 1 x 1 convolutions and a depthwise 5 x 5 one between them, in place of attention."""

    def __init__(self, dim: int, first: bool) -> None:
        # The released numbering begins with a change of layout, which has no parameters.
        super().__init__(
            nn.Identity(),
            nn.Conv2d(dim, dim, 1),
            nn.Conv2d(dim, dim, 5, padding=2, groups=dim),
            nn.Conv2d(dim, dim, 1),
        )
        self.first = first

    def forward(self, x: Float[Tensor, "b i j k"]) -> Float[Tensor, "b i j k"]:  # type: ignore[override]
        """The same shape."""
        return super().forward(x) if self.first else as_map(super().forward(channels_first(x)))


class BiFormerBlock(nn.Module):
    """x + a depthwise convolution of x; then attention and a perceptron on a map.

    x <- x + attn(norm1(x)),  x <- x + mlp(norm2(x)); with `pre_norm=False`
    x <- norm1(x + attn(x)),  x <- norm2(x + mlp(x)).
    """

    def __init__(self, config: BiFormerConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        dim, stl = config.dims[stage], config.kind == "stl"
        self.first, self.pre_norm = config.layout == "nchw", config.pre_norm
        self.pos_embed = None
        if config.pos_dwconv:
            side = config.pos_dwconv
            self.pos_embed = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim)
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.attn = _attention(config, stage)
        self.norm2 = nn.LayerNorm(dim, config.norm_eps)
        hidden = int(config.mlp_ratios[stage] * dim)
        if self.first:
            ends: list[nn.Module] = [nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)]
        else:
            ends = [nn.Linear(dim, hidden), nn.Linear(hidden, dim)]
        middle: list[nn.Module] = [nn.GELU()]
        if not stl:
            middle = [OnMap(hidden) if config.mlp_dwconv else nn.Identity(), nn.GELU()]
        self.mlp = nn.Sequential(ends[0], *middle, ends[1])
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if config.layer_scale:
            self.gamma1 = nn.Parameter(torch.full((dim,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), config.layer_scale))

    def _branch(
        self, part: nn.Module, x: Tensor, gamma: nn.Parameter | None
    ) -> Float[Tensor, "b h w c"]:
        y = as_map(part(channels_first(x))) if self.first else part(x)
        return self.drop_path(y if gamma is None else gamma * y)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        if self.pos_embed is not None:
            x = x + as_map(self.pos_embed(channels_first(x)))
        if self.pre_norm:
            x = x + self._branch(self.attn, self.norm1(x), self.gamma1)
            return x + self._branch(self.mlp, self.norm2(x), self.gamma2)
        x = self.norm1(x + self._branch(self.attn, x, self.gamma1))
        return self.norm2(x + self._branch(self.mlp, x, self.gamma2))


class Blocks(nn.Module):
    """Blocks one after the other, under the name `blocks`."""

    def __init__(self, blocks: list[BiFormerBlock]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        return self.blocks(x)


class BiFormer(Classifier):
    """A backbone whose regions attend to the few regions that fit them best.

    Images may have any sides; maps are filled up to whole regions as `padding` says.

    >>> import torch
    >>> sizes = {"dims": (16, 32), "depths": (1, 1), "mlp_ratios": (2, 2), "topks": (2, -2)}
    >>> model = BiFormer(BiFormerConfig(**sizes, n_win=2, head_dim=8, features_only=True))
    >>> [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 48))]
    [(1, 16, 16, 12), (1, 32, 8, 6)]
    """

    KIND = "biformer"
    CONFIG = BiFormerConfig
    config: BiFormerConfig

    def __init__(self, config: BiFormerConfig) -> None:
        super().__init__(config)
        rates = drop_rates(config.drop_path, config.depths)
        self.downsample_layers = nn.ModuleList(
            _smaller(config, stage) for stage in range(len(config.dims))
        )
        stages: list[nn.Module] = []
        for stage, each in enumerate(rates):
            blocks = [BiFormerBlock(config, stage, rate) for rate in each]
            stages.append(Blocks(blocks) if config.kind == "stl" else nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        if not config.features_only:
            self.norm = nn.BatchNorm2d(config.dims[-1])
            self.head = nn.Linear(config.dims[-1], config.classes)
        self.start()

    def maps(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], ...]:
        """The map after every stage, channels first."""
        self.check(image)
        x, found = image, []
        for smaller, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = channels_first(stage(as_map(smaller(x)))).contiguous()
            found.append(x)
        return tuple(found)

    def features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The mean of all tokens after the batch norm."""
        return self.norm(self.maps(image)[-1]).mean((2, 3))

    def forward(self, image: Float[Tensor, "b c h w"]) -> Any:
        """Logits [B, classes], or with `features_only` the maps of all stages."""
        if self.config.features_only:
            return self.maps(image)
        return super().forward(image)


def _attention(config: BiFormerConfig, stage: int) -> nn.Module:
    dim, topk, first = config.dims[stage], config.topks[stage], config.layout == "nchw"
    if topk == 0:
        return Convolutions(dim, first)
    if topk < 0:
        beside = "values" if first else ("input" if topk == -2 else None)
        return FullAttention(dim, config.full_heads, beside, config.side_dwconv, first)
    width = dim if config.qk_dims is None else config.qk_dims[stage]
    if width % config.head_dim:
        raise reject("BiFormer", "head_dim", f"a divisor of {width}", config.head_dim)
    pooled = None if config.kv_per_wins is None else config.kv_per_wins[stage]
    adaptive = config.kv_downsample.startswith("ada")
    return BiLevelRoutingAttention(
        dim, width // config.head_dim, config.n_win, topk, width,
        side_dwconv=config.side_dwconv, layout=config.layout, padding=config.padding,
        soft_routing=config.soft_routing, diff_routing=config.diff_routing,
        param_routing=config.param_routing, kv_downsample=config.kv_downsample,
        kv_per_win=pooled if adaptive else None, kv_downsample_ratio=None if adaptive else pooled,
    )  # fmt: skip


def _smaller(config: BiFormerConfig, stage: int) -> nn.Module:
    """To a quarter of the sides at first, then to half of them."""
    dim, before = config.dims[stage], config.dims[max(stage - 1, 0)]
    if config.kind == "stl":
        if stage:
            return nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, dim, 2, 2))
        return nn.Sequential(nn.Conv2d(config.channels, dim, 4, 4), nn.BatchNorm2d(dim))
    if stage:
        return nn.Sequential(nn.Conv2d(before, dim, 3, 2, 1), nn.BatchNorm2d(dim))
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(config.channels, half, 3, 2, 1),
        nn.BatchNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, dim, 3, 2, 1),
        nn.BatchNorm2d(dim),
    )
