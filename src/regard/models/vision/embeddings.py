"""From an image to a map of tokens, and from a map to a smaller one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad


def as_map(image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w c"]:
    """The same numbers with the channels last."""
    return image.permute(0, 2, 3, 1)


def filled(x: Float[Tensor, "b h w c"], multiple: int) -> Float[Tensor, "b i j c"]:
    """Zeros on the right and below, to sides that are multiples."""
    if x.shape[1] % multiple or x.shape[2] % multiple:
        x = pad(x, (0, 0, 0, -x.shape[2] % multiple, 0, -x.shape[1] % multiple))
    return x


class PatchEmbed(nn.Module):
    """A strided convolution over a map, with a layer norm before it, after it, or none.

    fill: zeros on the right and below where the sides are no multiples of the stride; without,
        what is left over is not seen.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        side: int,
        stride: int | None = None,
        padding: int = 0,
        norm: str | None = "after",
        norm_eps: float = 1e-5,
        fill: bool = False,
    ) -> None:
        super().__init__()
        self.stride = side if stride is None else stride
        self.proj = nn.Conv2d(channels, dim, side, self.stride, padding)
        self.before, self.fill = norm == "before", fill
        size = channels if self.before else dim
        self.norm = None if norm is None else nn.LayerNorm(size, norm_eps)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j d"]:
        """A map with fewer tokens."""
        if self.norm is not None and self.before:
            x = self.norm(x)
        if self.fill:
            x = filled(x, self.stride)
        x = as_map(self.proj(x.permute(0, 3, 1, 2)))
        return x if self.norm is None or self.before else self.norm(x)


class PatchMerging(nn.Module):
    """Four neighbours side by side, a layer norm, and a linear map to `dim` channels.

    The four are those of even rows and columns, of odd rows, of odd columns, and of both. An odd
    side is filled up with zeros.
    """

    def __init__(self, channels: int, dim: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, norm_eps)
        self.reduction = nn.Linear(4 * channels, dim, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j d"]:
        """A map of half the sides."""
        x = filled(x, 2)
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, 3)))


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with batch norms, a ReLU between them; a layer norm.

    The image is filled up with zeros to multiples of 4.
    """

    def __init__(self, channels: int, dim: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        half = dim // 2
        self.proj = nn.Sequential(
            nn.Conv2d(channels, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )
        self.norm = nn.LayerNorm(dim, norm_eps)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i j d"]:
        """A map of a quarter of the sides."""
        x = filled(x, 4)
        return self.norm(as_map(self.proj(x.permute(0, 3, 1, 2))))
