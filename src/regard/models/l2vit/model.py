"""L2ViT: local window attention and linear global attention in turn.

Source: Zheng 2025, arXiv 2501.16182, https://github.com/ChuanyangZheng/L2ViT (MIT); written from
the equations and the shapes of its checkpoints, matched to its outputs.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.mixers.relu_linear import LinearGlobalAttention, LocalConcentration2d
from regard.mixers.window import WindowAttention2d
from regard.models.l2vit.config import L2ViTConfig
from regard.models.vision import (
    Classifier,
    ConvStem,
    DropPath,
    Mlp,
    PatchEmbed,
    Stage,
    as_map,
    drop_rates,
)
from regard.models.vision.classifier import average


class ConditionalPosition(nn.Module):
    """x + a 3 x 3 convolution of every channel: positions that follow from the neighbours."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        return x + as_map(self.proj(x.permute(0, 3, 1, 2)))


class LGABlock(nn.Module):
    """Linear global attention, what concentrates it again, and a perceptron, on a map.

        x <- x + conv(x),                                      cpe.0
        x <- x + attn(norm1(x)),   x <- x + local_mp(norm3(x)),   x <- x + mlp(norm2(x))

    Args:
        dim, heads, mlp_ratio, qkv_bias, minimum, drop_path: of its parts.
        enhanced: whether there is a `LocalConcentration2d`.

    Source: Zheng 2025, arXiv 2501.16182; the state dict has the authors' names.

    >>> import torch
    >>> LGABlock(16, heads=2)(torch.randn(2, 5, 6, 16)).shape
    torch.Size([2, 5, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        enhanced: bool = True,
        minimum: float = 100.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConditionalPosition(dim)])
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = LinearGlobalAttention(dim, heads, qkv_bias, minimum)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(dim, norm_eps) if enhanced else None
        self.local_mp = LocalConcentration2d(dim) if enhanced else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        x = self.cpe[0](x)
        tokens = self.norm1(x).flatten(1, 2)
        x = x + self.drop_path(self.attn(tokens).view(x.shape))
        if self.norm3 is not None and self.local_mp is not None:
            image = self.norm3(x).permute(0, 3, 1, 2)
            x = x + self.drop_path(as_map(self.local_mp(image)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LWABlock(nn.Module):
    """Softmax attention in windows and a perceptron, on a map, each after a convolution.

        x <- x + conv(x),   x <- x + attn(norm1(x)),           cpe.0
        x <- x + conv(x),   x <- x + mlp(norm2(x))             cpe.1

    Args:
        dim, heads, window, mlp_ratio, qkv_bias, drop_path: of its parts.

    Source: Zheng 2025, arXiv 2501.16182; the state dict has the authors' names.

    >>> import torch
    >>> LWABlock(16, heads=2, window=4)(torch.randn(2, 5, 6, 16)).shape
    torch.Size([2, 5, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConditionalPosition(dim), ConditionalPosition(dim)])
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = WindowAttention2d(dim, heads, window, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class L2ViT(Classifier):
    """Four stages of window attention and linear global attention in turn: time linear in pixels.

    Images may have any sides; maps are filled up with zeros where they must be. The global
    blocks divide by at least `minimum`, so that they act otherwise on a small map than on a large
    one (see `regard.ops.relu_linear_attention`).

    >>> import torch
    >>> sizes = {"dims": (8, 12), "depths": (2, 2), "heads": (1, 2), "mlp_ratios": (2, 2)}
    >>> model = L2ViT(L2ViTConfig(**sizes, window=3, features_only=True))
    >>> [tuple(x.shape) for x in model(torch.randn(1, 3, 33, 46))]
    [(1, 8, 9, 12), (1, 12, 5, 6)]
    """

    KIND = "l2vit"
    CONFIG = L2ViTConfig
    config: L2ViTConfig

    def __init__(self, config: L2ViTConfig) -> None:
        super().__init__(config)
        rates, eps, dims = drop_rates(config.drop_path, config.depths), config.norm_eps, config.dims
        stages = []
        for stage, dim in enumerate(dims):
            embed: nn.Module = ConvStem(config.channels, dim, eps)
            if stage:
                embed = PatchEmbed(dims[stage - 1], dim, 2, norm="before", norm_eps=eps, fill=True)
            blocks = [self._block(stage, n, rate) for n, rate in enumerate(rates[stage])]
            stages.append(Stage(embed, blocks))
        self.stages = nn.ModuleList(stages)
        if config.features_only:
            self.norms = nn.ModuleList(nn.LayerNorm(dim, eps) for dim in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1], eps)
            self.head = nn.Linear(dims[-1], config.classes)
        self.start()

    def _block(self, stage: int, number: int, rate: float) -> nn.Module:
        config = self.config
        sizes = {
            "dim": config.dims[stage], "heads": config.heads[stage],
            "mlp_ratio": config.mlp_ratios[stage], "qkv_bias": config.qkv_bias,
            "drop_path": rate, "norm_eps": config.norm_eps,
        }  # fmt: skip
        if config.local(number):
            return LWABlock(window=config.window, **sizes)
        return LGABlock(minimum=config.minimum, **sizes)

    def start(self) -> None:
        """As the frame says, convolutions likewise."""
        super().start()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], ...]:
        """The map after every stage, channels first; normalised with `features_only`."""
        self.check(image)
        x, found = as_map(image), []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            y = self.norms[number](x) if self.config.features_only else x
            found.append(y.permute(0, 3, 1, 2).contiguous())
        return tuple(found)

    def features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The mean of all tokens after the last norm."""
        x = as_map(image)
        for stage in self.stages:
            x = stage(x)
        return average(self.norm(x))

    def forward(self, image: Float[Tensor, "b c h w"]) -> Any:
        """Logits [B, classes], or with `features_only` the maps of all stages."""
        if self.config.features_only:
            return self.maps(image)
        return super().forward(image)
