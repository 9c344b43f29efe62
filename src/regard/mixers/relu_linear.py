"""The global layer of L2ViT: linear attention of ReLU features, and what concentrates it again."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from regard.core.checks import check_flag, check_integer, check_number, reject
from regard.mixers.inline import check_heads
from regard.ops.relu_linear import relu_linear_attention


class LinearGlobalAttention(nn.Module):
    """Attention of every token to all others with ReLU features and a clamped sum of weights.

        q, k, v = W_qkv x + b,   y = W_o relu_linear_attention(q, k, v, temperature) + b_o

    with a learned temperature per head, at the start D ** -0.5. It multiplies the output: where
    the sum of weights is below `minimum`, a token's output shrinks with its query.

    Args:
        dim: C.
        heads: H.
        qkv_bias: whether W_qkv has a bias.
        minimum: what the sum of weights is clamped to.

    Shapes: x [B, N, C] -> the same. The state dict has the authors' names: `qkv.*`, `proj.*`,
    `temperature` [H, 1, 1].

    Precision, limits: of the op. Cost: O(N C^2 / H + N C^2).
    Source: Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv
        2501.16182; outputs and gradients of the authors' layer are matched to 1e-5 in float32.
    Raises: TypeError, ValueError naming the argument.

    >>> LinearGlobalAttention(32, heads=4)(torch.randn(2, 49, 32)).shape
    torch.Size([2, 49, 32])
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, minimum: float = 100.0) -> None:
        super().__init__()
        op = type(self).__name__
        check_heads(op, dim, heads)
        check_flag(op, "qkv_bias", qkv_bias)
        check_number(op, "minimum", minimum, least=0.0)
        self.dim, self.heads, self.minimum = dim, heads, float(minimum)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), (dim // heads) ** -0.5))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.heads}, minimum={self.minimum:g}"

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The same shape."""
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.dim:
            raise reject(type(self).__name__, "x", f"of shape [batch, tokens, {self.dim}]", x)
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        temperature = self.temperature.flatten()
        out = relu_linear_attention(q, k, v, temperature=temperature, minimum=self.minimum)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


class LocalConcentration2d(nn.Module):
    """Two large depth-wise convolutions, which gather around a token what attention spread evenly.

        y = W_2 * norm(gelu(W_1 * x + b_1)) + b_2     * : a convolution per channel

    with batch normalisation. Borders see zeros.

    Args:
        dim: C.
        side: of the kernels, odd; the published models have 7.

    Shapes: x [B, C, h, w] -> the same. The state dict has the authors' names: `conv1.*`, `bn.*`,
    `conv2.*`.

    Precision: that of torch's convolution. Cost: O(2 side^2 h w C).
    Source: Zheng 2025, arXiv 2501.16182; matched to 1e-5 in float32.

    >>> LocalConcentration2d(8)(torch.randn(2, 8, 5, 9)).shape
    torch.Size([2, 8, 5, 9])
    """

    def __init__(self, dim: int, side: int = 7) -> None:
        super().__init__()
        op = type(self).__name__
        check_integer(op, "dim", dim)
        check_integer(op, "side", side)
        if side % 2 == 0:
            raise reject(op, "side", "odd", side)
        self.conv1 = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        return self.conv2(self.bn(gelu(self.conv1(x))))
