"""The InLine families: DeiT, PVT, Swin and CSwin with injective linear attention.

Source: Han et al. 2024, arXiv 2412.06590, https://github.com/LeapLabTHU/InLine (no licence file);
written from the equations and the shapes of its checkpoints, matched to its outputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.checks import reject
from regard.mixers.inline import InLineAttention
from regard.mixers.window import WindowAttention2d
from regard.models.inline.attention import MapInLine, ReducedAttention, StripeAttention
from regard.models.inline.config import (
    InlineCSwinConfig,
    InlineDeiTConfig,
    InlinePVTConfig,
    InlinePyramidConfig,
    InlineSwinConfig,
)
from regard.models.vision import (
    Block,
    Classifier,
    PatchEmbed,
    PatchMerging,
    Stage,
    as_map,
    drop_rates,
)
from regard.models.vision.classifier import average

SOFTMAX_SHARE, SOFTMAX_LEAST = 8, 7  # of a window: the side of Swin's softmax blocks


class InlineDeiT(Classifier):
    """InLine attention in DeiT: patches and a class token, whose features the head reads.

    The class token takes part in the attention but has no local residual. Images have the side of
    the config, as positions are learned.

    >>> model = InlineDeiT(InlineDeiTConfig(image_size=32, patch_size=8, dim=24, depth=2, heads=3))
    >>> model(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 1000])
    """

    KIND = "inline_deit"
    CONFIG = InlineDeiTConfig
    config: InlineDeiTConfig

    def __init__(self, config: InlineDeiTConfig) -> None:
        super().__init__(config)
        dim, eps = config.dim, config.norm_eps
        self.embed = PatchEmbed(config.channels, dim, config.patch_size, norm=None)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + config.side**2, dim))
        rates = drop_rates(config.drop_path, [config.depth])[0]
        self.blocks = nn.ModuleList(
            Block(
                dim,
                InLineAttention(
                    dim, config.heads, prefix_tokens=1, qkv_bias=config.qkv_bias,
                    feature_map=config.feature_map,
                ),
                config.mlp_ratio, rate, eps,
            )
            for rate in rates
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps)
        self.head = nn.Linear(dim, config.classes)
        self.start()

    def start(self) -> None:
        """As the frame says; class token and positions likewise, the head 0."""
        super().start()
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.zeros_(self.head.weight)

    def features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The class token after the last norm."""
        side = self.config.image_size
        if tuple(image.shape[2:]) != (side, side):
            raise reject("InlineDeiT", "image", f"of {side} x {side} pixels", image)
        tokens = self.embed(as_map(image)).flatten(1, 2)
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class Pyramid(Classifier):
    """Stages one after the other; the head reads the mean token.

    A subclass says how a stage begins (`embed`) and how its blocks mix (`block`).
    """

    NORM = True  # whether a layer norm follows the last stage
    config: InlinePyramidConfig

    def __init__(self, config: InlinePyramidConfig) -> None:
        super().__init__(config)
        rates = drop_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList(
            Stage(
                self.embed(stage),
                [self.block(stage, number, rate) for number, rate in enumerate(rates[stage])],
                self.position(stage),
            )
            for stage in range(len(config.dims))
        )
        last = config.dims[-1]
        self.norm = nn.LayerNorm(last, config.norm_eps) if self.NORM else nn.Identity()
        self.head = nn.Linear(last, config.classes)
        self.start()

    def embed(self, stage: int) -> nn.Module:
        """What makes the map of a stage from that before it, or from the image."""
        raise NotImplementedError

    def block(self, stage: int, number: int, rate: float) -> nn.Module:
        """One block of a stage."""
        raise NotImplementedError

    def position(self, stage: int) -> tuple[int, int, int] | None:
        """The shape of the stage's learned positions, or None."""
        return None

    def maps(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], ...]:
        """The map after every stage, channels first, as detectors and segmenters take them."""
        self.check(image)
        x, found = as_map(image), []
        for stage in self.stages:
            x = stage(x)
            found.append(x.permute(0, 3, 1, 2).contiguous())
        return tuple(found)

    def features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The mean of all tokens after the last norm."""
        x = as_map(image)
        for stage in self.stages:
            x = stage(x)
        return average(self.norm(x))


class InlinePVT(Pyramid):
    """InLine attention in the pyramid vision transformer.

    >>> sizes = {"dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "mlp_ratios": (2, 2)}
    >>> config = InlinePVTConfig(**sizes, attention="IS", reductions=(2, 1), image_size=32)
    >>> InlinePVT(config)(torch.randn(1, 3, 32, 40)).shape
    torch.Size([1, 1000])
    """

    KIND = "inline_pvt"
    CONFIG = InlinePVTConfig
    NORM = False
    config: InlinePVTConfig

    def embed(self, stage: int) -> nn.Module:
        """A convolution whose stride is its side, and a norm."""
        config = self.config
        side = config.patch_size if stage == 0 else 2
        channels = config.channels if stage == 0 else config.dims[stage - 1]
        return PatchEmbed(channels, config.dims[stage], side, norm="after")

    def position(self, stage: int) -> tuple[int, int, int]:
        """One per token at the size of the config."""
        side = self.config.image_size // self.config.patch_size // 2**stage
        return side, side, self.config.dims[stage]

    def block(self, stage: int, number: int, rate: float) -> nn.Module:
        """Attention over the whole map, or to a coarser one."""
        config, dim, heads = self.config, self.config.dims[stage], self.config.heads[stage]
        if config.inline(stage, number):
            attn: nn.Module = MapInLine(
                dim, heads, qkv_bias=config.qkv_bias, feature_map=config.feature_map
            )
        else:
            attn = ReducedAttention(dim, heads, config.reductions[stage], config.qkv_bias)
        return Block(dim, attn, config.mlp_ratios[stage], rate, config.norm_eps)

    def start(self) -> None:
        """As the frame says, positions likewise."""
        super().start()
        for stage in self.stages:
            nn.init.trunc_normal_(stage.position, std=0.02)  # type: ignore[arg-type]


class InlineSwin(Pyramid):
    """InLine attention in Swin: the first stages see the whole map where Swin sees windows.

    >>> sizes = {"dims": (8, 16), "depths": (1, 2), "heads": (1, 2), "mlp_ratios": (2, 2)}
    >>> config = InlineSwinConfig(**sizes, attention="IS", image_size=112, window=28)
    >>> InlineSwin(config)(torch.randn(1, 3, 112, 96)).shape
    torch.Size([1, 1000])
    """

    KIND = "inline_swin"
    CONFIG = InlineSwinConfig
    config: InlineSwinConfig

    def embed(self, stage: int) -> nn.Module:
        """A convolution and a norm; later, four neighbours merged."""
        config, dim = self.config, self.config.dims[stage]
        if stage == 0:
            return PatchEmbed(config.channels, dim, config.patch_size, norm="after")
        return PatchMerging(config.dims[stage - 1], dim)

    def block(self, stage: int, number: int, rate: float) -> nn.Module:
        """Windows, shifted in every other block unless one covers the map."""
        config, dim, heads = self.config, self.config.dims[stage], self.config.heads[stage]
        inline, side = config.inline(stage, number), config.side(stage)
        window = config.window if inline else max(SOFTMAX_LEAST, config.window // SOFTMAX_SHARE)
        shift = window // 2 if number % 2 and side > window else 0
        window = min(window, side)
        attn: nn.Module
        if inline:
            attn = MapInLine(dim, heads, window, shift, config.qkv_bias, config.feature_map)
        else:
            attn = WindowAttention2d(
                dim, heads, window, shift, relative_bias=True, qkv_bias=config.qkv_bias
            )
        return Block(dim, attn, config.mlp_ratios[stage], rate, config.norm_eps)


class CSwinBlock(Block):
    """A block whose local residual is predicted from its input before the norm."""

    def mix(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The first branch."""
        return self.attn(self.norm1(x), average(x))


class InlineCSwin(Pyramid):
    """InLine attention in CSwin: whole maps first, crossing stripes later.

    >>> sizes = {"dims": (8, 16), "depths": (1, 1), "heads": (2, 2), "mlp_ratios": (2, 2)}
    >>> config = InlineCSwinConfig(**sizes, attention="IS", stripes=(1, 2), image_size=32)
    >>> InlineCSwin(config)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 1000])
    """

    KIND = "inline_cswin"
    CONFIG = InlineCSwinConfig
    config: InlineCSwinConfig

    def embed(self, stage: int) -> nn.Module:
        """Convolutions whose windows overlap, and norms."""
        config, dim = self.config, self.config.dims[stage]
        if stage == 0:
            return PatchEmbed(config.channels, dim, 7, config.patch_size, 2, norm="after")
        return PatchEmbed(config.dims[stage - 1], dim, 3, 2, 1, norm="after")

    def block(self, stage: int, number: int, rate: float) -> nn.Module:
        """Stripes, or the whole map."""
        config, dim, heads = self.config, self.config.dims[stage], self.config.heads[stage]
        inline = config.inline(stage, number)
        stripe = None if inline or config.whole(stage) else config.stripes[stage]
        attn = StripeAttention(
            dim, heads, stripe, inline, config.qkv_bias, config.feature_map
        )  # fmt: skip
        return CSwinBlock(dim, attn, config.mlp_ratios[stage], rate, config.norm_eps)
