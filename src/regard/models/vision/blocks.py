"""Blocks of vision backbones: two residual branches, and stages of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu


class DropPath(nn.Module):
    """Leaves a residual branch out for some images while training, and scales up the others.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv 1603.09382.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = float(probability)

    def extra_repr(self) -> str:
        return f"{self.probability:g}"

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The same shape."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = torch.rand((len(x), *(1,) * (x.dim() - 1)), device=x.device) < keep
        return x * (mask.to(x.dtype) / keep)


def drop_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Probabilities for every block of every stage, rising evenly from 0 to `last`.

    >>> drop_rates(0.2, (1, 2))
    [[0.0], [0.1, 0.2]]
    """
    total, rates, number = sum(depths), [], 0
    for depth in depths:
        places = range(number, number + depth)
        rates.append([last * i / (total - 1) if total > 1 else 0.0 for i in places])
        number += depth
    return rates


class Mlp(nn.Module):
    """y = W_2 gelu(W_1 x + b_1) + b_2, with the exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """The same shape."""
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def mix(self, x: Float[Tensor, "b *n c"]) -> Float[Tensor, "b *n c"]:
        """The first branch."""
        return self.attn(self.norm1(x))

    def forward(self, x: Float[Tensor, "b *n c"]) -> Float[Tensor, "b *n c"]:
        """The same shape."""
        x = x + self.drop_path(self.mix(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """An embedding, which makes the map smaller, a position if there is one, and blocks.

    position: learned, [1, h, w, C]; resized bilinearly to a map of another size.
    """

    def __init__(
        self,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        position: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.position = None
        if position is not None:
            self.position = nn.Parameter(torch.zeros(1, *position))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j d"]:
        """A smaller map."""
        x = self.embed(x)
        if self.position is not None:
            x = x + resized(self.position, (x.shape[1], x.shape[2]))
        for block in self.blocks:
            x = block(x)
        return x


def resized(position: Float[Tensor, "1 h w c"], sides: tuple[int, int]) -> Float[Tensor, "1 i j c"]:
    """A map of positions, interpolated to these sides if it has others."""
    if position.shape[1:3] == sides:
        return position
    image = nn.functional.interpolate(position.permute(0, 3, 1, 2), size=sides, mode="bilinear")
    return image.permute(0, 2, 3, 1)
