"""HaloNet: bottleneck networks with halo attention.

Source: Vaswani et al. 2021, arXiv 2103.12731; the layout is that of timm (Apache-2.0), whose
outputs are matched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.checks import reject
from regard.mixers.halo import HaloAttention, RelativePosition2d, divisible
from regard.models.halonet.config import HaloNetConfig
from regard.models.vision import Classifier, DropPath, drop_rates
from regard.ops.window.halo import halo_attention

ACTS = {"relu": nn.ReLU, "silu": nn.SiLU}


class ConvNorm(nn.Module):
    """A convolution without bias and a batch norm; then an activation, if given."""

    def __init__(
        self, dim: int, out: int, side: int = 1, stride: int = 1, groups: int = 1,
        act: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(dim, out, side, stride, side // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.Identity() if act is None else ACTS[act]()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """The map that follows."""
        return self.act(self.bn(self.conv(x)))


class SqueezeExcite(nn.Module):
    """x times a gate per channel, from the mean token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = divisible(dim / 16)
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class EfficientChannels(nn.Module):
    """x times a gate per channel, from the mean token and its neighbours in channel order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        side = int(abs(math.log2(dim) + 1) / 2)
        side = max(side if side % 2 else side + 1, 3)
        self.conv = nn.Conv1d(1, 1, side, padding=side // 2, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        gate = self.conv(x.mean((2, 3))[:, None]).sigmoid()
        return x * gate.transpose(1, 2)[..., None]


class GlobalAttention(nn.Module):
    """Attention over a whole square map with relative positions, as in BoTNet."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.pos_embed = RelativePosition2d(side, dim // heads)
        nn.init.trunc_normal_(self.qkv.weight, std=dim**-0.5)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        if tuple(x.shape[2:]) != (self.side, self.side):
            accepted = f"of {self.side} x {self.side} tokens where attention is global"
            raise reject("HaloNet", "image", accepted, x)
        q, k, v = (
            y.unflatten(1, (self.heads, -1)).permute(0, 1, 3, 4, 2) for y in self.qkv(x).chunk(3, 1)
        )
        tables = self.pos_embed.height_rel, self.pos_embed.width_rel
        y = halo_attention(q, k, v, *tables, block=self.side, halo=0)
        return y.permute(0, 1, 4, 2, 3).flatten(1, 2)


class Bottleneck(nn.Module):
    """act(shortcut(x) + conv3(middle(conv1(x)))), the middle a convolution or attention."""

    def __init__(
        self, config: HaloNetConfig, kind: str, dim: int, stage: int, stride: int, rate: float
    ) -> None:
        super().__init__()
        mid, out, act = config.mids[stage], config.outs[stage], config.act
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim != out:
            self.shortcut = ConvNorm(dim, out, stride=stride)
        self.conv1_1x1 = ConvNorm(dim, mid, act=act)
        width = mid
        self.conv2_kxk: ConvNorm | None = None
        if kind == "c":
            groups = mid // config.group if config.group else 1
            self.conv2_kxk = ConvNorm(mid, mid, 3, stride, groups, act)
            self.attn: nn.Module = nn.Identity()
            if config.squeeze or config.eca:
                self.attn = SqueezeExcite(mid) if config.squeeze else EfficientChannels(mid)
        else:
            if kind == "g":
                if stride != 1:
                    raise reject("HaloNetConfig", "stages", "without g first in a stage", kind)
                self.self_attn: nn.Module = GlobalAttention(
                    mid, config.global_heads, config.global_side
                )  # fmt: skip
            else:
                width = round(mid * config.values)
                heads = config.heads[stage]
                head_dim = config.head_dim
                if head_dim is None:
                    head_dim = divisible(mid) // heads
                self.self_attn = HaloAttention(
                    mid, width, stride, heads, head_dim, config.block, config.halo, fill=config.fill
                )  # fmt: skip
            self.post_attn = nn.BatchNorm2d(width)
            self.post_act = ACTS[act]()
        self.conv3_1x1 = ConvNorm(width, out)
        self.drop_path = DropPath(rate)
        self.act = ACTS[act]()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """The map that follows."""
        y = self.conv1_1x1(x)
        if self.conv2_kxk is not None:
            y = self.attn(self.conv2_kxk(y))
        else:
            y = self.post_act(self.post_attn(self.self_attn(y)))
        return self.act(self.shortcut(x) + self.drop_path(self.conv3_1x1(y)))


class TieredStem(nn.Module):
    """Three 3 x 3 convolutions of growing width, and a max pool if asked."""

    def __init__(self, config: HaloNetConfig) -> None:
        super().__init__()
        dim, act = config.stem_dim, config.act
        last = 1 if config.stem_pool else 2
        self.conv1 = ConvNorm(config.channels, 3 * dim // 8, 3, 2, act=act)
        self.conv2 = ConvNorm(3 * dim // 8, dim // 2, 3, act=act)
        self.conv3 = ConvNorm(dim // 2, dim, 3, last, act=act)
        self.pool = nn.MaxPool2d(3, 2, 1) if config.stem_pool else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """A map of a quarter of the sides."""
        return self.pool(self.conv3(self.conv2(self.conv1(x))))


class SingleStem(nn.Module):
    """One 7 x 7 convolution and a max pool if asked."""

    def __init__(self, config: HaloNetConfig) -> None:
        super().__init__()
        self.conv = ConvNorm(config.channels, config.stem_dim, 7, 2, act=config.act)
        self.pool = nn.MaxPool2d(3, 2, 1) if config.stem_pool else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """A smaller map."""
        return self.pool(self.conv(x))


class Head(nn.Module):
    """The linear map, under timm's name."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        """Logits."""
        return self.fc(x)


class HaloNet(Classifier):
    """A bottleneck network with halo attention in some blocks or all.

    Maps whose sides are no multiples of the block are filled up, unless `fill=False`.

    >>> import torch
    >>> config = HaloNetConfig(
    ...     stages=("c", "h"), mids=(8, 16), outs=(16, 32), strides=(1, 2), heads=(2, 2),
    ...     block=4, halo=1, stem_dim=16, classes=5,
    ... )
    >>> HaloNet(config).eval()(torch.randn(1, 3, 64, 48)).shape
    torch.Size([1, 5])
    """

    KIND = "halonet"
    CONFIG = HaloNetConfig
    config: HaloNetConfig
    head: Any

    def __init__(self, config: HaloNetConfig) -> None:
        super().__init__(config)
        self.stem = TieredStem(config) if config.stem == "tiered" else SingleStem(config)
        depths = [len(letters) for letters in config.stages]
        rates, dim, stages = drop_rates(config.drop_path, depths), config.stem_dim, []
        for stage, letters in enumerate(config.stages):
            blocks = []
            for number, kind in enumerate(letters):
                stride = 1 if number else config.strides[stage]
                rate = rates[stage][number]
                blocks.append(Bottleneck(config, kind, dim, stage, stride, rate))
                dim = config.outs[stage]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final_conv: nn.Module = nn.Identity()
        if config.last:
            self.final_conv = ConvNorm(dim, config.last, act=config.act)
        self.head = Head(config.last or dim, config.classes)
        self.start()

    def start(self) -> None:
        """Convolutions normal with variance 2 / fan out, the head 0.01; last norms begin at 0."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3_1x1.bn.weight)
        nn.init.normal_(self.head.fc.weight, std=0.01)
        nn.init.zeros_(self.head.fc.bias)

    def maps(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], ...]:
        """The map after every stage."""
        self.check(image)
        x, found = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return tuple(found)

    def features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The mean token of the last map."""
        return torch.mean(self.final_conv(self.maps(image)[-1]), (2, 3))
