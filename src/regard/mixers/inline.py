"""The layer of InLine: injective linear attention, and the local residual that goes with it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from regard.core.checks import check_choice, check_flag, check_integer, check_shape, reject, words
from regard.mixers.grids import check_grid, grid_of
from regard.ops.inline import FEATURE_MAPS, inline_attention

SIDE = 3  # of the predicted kernels


class LocalResidual2d(nn.Sequential):
    """A 3 x 3 convolution of every channel, with kernels that the image predicts for itself.

        r = W_2 gelu(W_1 c + b_1) + b_2,   y_c = r_c * x_c      c: a summary of the image [C]

    r holds nine numbers per channel, the rows of its kernel one after the other; W_1 and W_2 are
    block-diagonal, with a block per head. Borders see zeros.

    Shapes: image [B, C, h, w], context [B, C] -> [B, C, h, w]. The state dict has the authors'
    names: `0.weight` [C, C / heads, 1], `0.bias`, `2.weight` [9 C, C / heads, 1], `2.bias`.

    Precision: that of torch's convolution. Cost: O(9 h w C), and O(10 C^2 / heads) per image.
    Source: Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", 2024,
        arXiv 2412.06590, and its code.

    >>> import torch
    >>> residual = LocalResidual2d(8, heads=2)
    >>> image = torch.randn(3, 8, 5, 6)
    >>> residual(image, image.mean((2, 3))).shape
    torch.Size([3, 8, 5, 6])
    """

    def __init__(self, dim: int, heads: int) -> None:
        check_heads(type(self).__name__, dim, heads)
        super().__init__(
            nn.Conv1d(dim, dim, 1, groups=heads),
            nn.GELU(),
            nn.Conv1d(dim, SIDE * SIDE * dim, 1, groups=heads),
        )
        self.dim = dim

    def forward(  # type: ignore[override]
        self, image: Float[Tensor, "b c h w"], context: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b c h w"]:
        """The image convolved with the kernels that `context` gives."""
        op = type(self).__name__
        if image.dim() != 4 or image.shape[1] != self.dim:
            raise reject(op, "image", f"of shape [batch, {self.dim}, height, width]", image)
        B, C, h, w = image.shape
        check_shape(op, "context", context, (B, C), image)
        kernels = self.kernels(context).reshape(B * C, 1, SIDE, SIDE)
        # One group per image and channel: a batch of convolutions with kernels of their own.
        stacked = image.reshape(1, B * C, h, w)
        if not B:
            return image + 0.0 * kernels.sum()
        return conv2d(stacked, kernels, padding=SIDE // 2, groups=B * C).view(B, C, h, w)

    def kernels(self, context: Float[Tensor, "b c"]) -> Float[Tensor, "b c 3 3"]:
        """The kernel of every channel."""
        return super().forward(context[..., None]).view(-1, self.dim, SIDE, SIDE)


class InLineAttention(nn.Module):
    """Attention of every token of an image to all others, in linear time, with a local residual.

        q, k, v = W_qkv x + b,   y = W_o (inline_attention(q, k, v) + residual(v, mean x)) + b_o

    where `inline_attention` subtracts the mean of a row of weights instead of dividing by its sum
    (`regard.ops.inline_attention`) and the residual convolves v, laid out as the image
    (`LocalResidual2d`). There are no positions but those that the residual gives.

    Args:
        dim: C.
        heads: H.
        grid: (height, width) of the image; None: a square, or what the call says.
        prefix_tokens: tokens before those of the image, as a class token: they take part in the
            attention and have no residual.
        qkv_bias: whether W_qkv has a bias.
        feature_map: of `inline_attention`; the published models have "identity".
        residual: False leaves the convolution out.

    Shapes: x [B, prefix + h w, C], row after row -> the same. The state dict has the authors'
    names: `qkv.weight` [3 C, C] (q, k, v), `qkv.bias`, `proj.*`, `residual.0.*`, `residual.2.*`.

    Precision, limits: of the op. Cost: O(N C^2 / H + N C^2) for N tokens.
    Source: Han et al. 2024, arXiv 2412.06590; outputs and gradients of the authors' layers of
        DeiT and Swin are matched to 1e-5 in float32.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> layer = InLineAttention(32, heads=4, prefix_tokens=1)
    >>> layer(torch.randn(2, 1 + 6 * 6, 32)).shape, layer(torch.randn(2, 13, 32), (3, 4)).shape
    (torch.Size([2, 37, 32]), torch.Size([2, 13, 32]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: Sequence[int] | None = None,
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        feature_map: str = "identity",
        residual: bool = True,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_heads(op, dim, heads)
        check_integer(op, "prefix_tokens", prefix_tokens, least=0)
        check_flag(op, "qkv_bias", qkv_bias)
        check_flag(op, "residual", residual)
        check_choice(op, "feature_map", feature_map, FEATURE_MAPS)
        self.dim, self.heads, self.feature_map = dim, heads, feature_map
        self.grid = None if grid is None else check_grid(op, grid)
        self.prefix_tokens = prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.residual = LocalResidual2d(dim, heads) if residual else None

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.heads}, grid={self.grid}, prefix_tokens={self.prefix_tokens}"

    def forward(
        self, x: Float[Tensor, "b n c"], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b n c"]:
        """The same shape; `grid` is that of this call, where it is not that of the layer."""
        op, first = type(self).__name__, self.prefix_tokens
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.dim:
            raise reject(op, "x", f"of shape [batch, tokens, {self.dim}]", x)
        B, N, C = x.shape
        if first > N:
            raise reject(op, "x", f"of at least {first} tokens, prefix_tokens", words(f"{N}"))
        h, w = grid_of(op, self.grid if grid is None else grid, N - first)
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        out = inline_attention(q, k, v, feature_map=self.feature_map)
        out = out.transpose(1, 2).reshape(B, N, C)
        if self.residual is not None:
            image = v[:, :, first:].transpose(2, 3).reshape(B, C, h, w)
            local = self.residual(image, x.mean(1)).flatten(2).transpose(1, 2)
            if first:
                local = pad(local, (0, 0, first, 0))
            out = out + local
        return self.proj(out)


def check_heads(op: str, dim: int, heads: int) -> None:
    """Whole numbers, the first a multiple of the second."""
    check_integer(op, "dim", dim)
    check_integer(op, "heads", heads)
    if dim % heads:
        raise reject(op, "dim", f"a multiple of heads, {heads}", dim)
