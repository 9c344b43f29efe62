"""Softmax attention inside the windows of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from regard.core.checks import check_flag, check_integer, reject
from regard.mixers.grids import check_grid, cut, join
from regard.mixers.inline import check_heads
from regard.ops.softmax import softmax_attention

WALL = -100.0  # what the released code adds between regions that a shift has brought together


class WindowAttention2d(nn.Module):
    """Softmax attention of every token of an image to those of its window.

        q, k, v = W_qkv x + b,   y = W_o softmax(q k^T / sqrt(D) + bias) v + b_o   in each window

    An image that is no multiple of the window is filled up with zeros on the right and below;
    these tokens are not masked (their keys and values are the bias of W_qkv), as in the published
    models, and cut off again.

    Args:
        dim: C.
        heads: H.
        window: its side, or (height, width).
        shift: by how many tokens the windows are moved right and down, so that they straddle the
            borders of unshifted ones: the image is rolled, and tokens that were not neighbours do
            not see each other. Along an axis with a single window there is no shift.
        relative_bias: adds a learned bias per head and offset between two tokens.
        qkv_bias: whether W_qkv has a bias.

    Shapes: x [B, h, w, C] -> the same. The state dict has the authors' names: `qkv.*`, `proj.*`
    and, with `relative_bias`, `relative_position_bias_table` [(2 h - 1)(2 w - 1), H].

    Precision: of `regard.ops.softmax_attention`. Cost: O(h w M C) for windows of M tokens.
    Source: Liu et al., "Swin Transformer", 2021, arXiv 2103.14030; without shift and bias the
        local attention of L2ViT, arXiv 2501.16182, matched to 1e-5.
    Raises: TypeError, ValueError naming the argument.

    >>> layer = WindowAttention2d(32, heads=4, window=7, shift=3, relative_bias=True)
    >>> layer(torch.randn(2, 9, 16, 32)).shape
    torch.Size([2, 9, 16, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | Sequence[int],
        shift: int = 0,
        relative_bias: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_heads(op, dim, heads)
        check_integer(op, "shift", shift, least=0)
        check_flag(op, "relative_bias", relative_bias)
        check_flag(op, "qkv_bias", qkv_bias)
        self.dim, self.heads, self.shift = dim, heads, shift
        self.window = check_grid(op, window, "window")
        if shift >= min(self.window):
            raise reject(op, "shift", f"below the side of the window, {min(self.window)}", shift)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if relative_bias:
            h, w = self.window
            table = torch.empty((2 * h - 1) * (2 * w - 1), heads)
            self.relative_position_bias_table = nn.Parameter(table)
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.heads}, window={self.window}, shift={self.shift}"

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same shape."""
        op = type(self).__name__
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[3] != self.dim:
            raise reject(op, "x", f"of shape [batch, height, width, {self.dim}]", x)
        B, H, W, C = x.shape
        h, w = self.window
        x = pad(x, (0, 0, 0, -W % w, 0, -H % h))
        sides = x.shape[1], x.shape[2]
        shifts = tuple(self.shift if a > b else 0 for a, b in zip(sides, self.window, strict=True))
        if any(shifts):
            x = x.roll((-shifts[0], -shifts[1]), (1, 2))
        windows = cut(x, self.window)  # [B, n, m, C]
        n, m = windows.shape[1:3]
        qkv = self.qkv(windows).view(B, n, m, 3, self.heads, C // self.heads)
        # The windows stand beside the heads: one bias serves all images.
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        out = softmax_attention(q, k, v, bias=self._bias(sides, shifts, x))
        out = out.unflatten(1, (n, self.heads)).transpose(2, 3).reshape(B, n, m, C)
        out = join(self.proj(out), self.window, sides)
        if any(shifts):
            out = out.roll(shifts, (1, 2))
        return out[:, :H, :W]

    def _bias(self, sides: tuple[int, int], shifts: tuple[int, ...], like: Tensor) -> Tensor | None:
        """What is added to the scores, [1, n H, m, m], or None."""
        table, bias = self.relative_position_bias_table, None
        if table is not None:
            m = self.window[0] * self.window[1]
            index = relative_positions(self.window, table.device)
            bias = table[index.flatten()].view(1, m, m, self.heads).permute(0, 3, 1, 2)
        if any(shifts):
            walls = _walls(sides, self.window, shifts, like)[:, None]
            bias = walls.expand(-1, self.heads, -1, -1) if bias is None else bias + walls
        elif bias is not None:
            count = sides[0] // self.window[0] * (sides[1] // self.window[1])
            bias = bias.expand(count, -1, -1, -1)
        return None if bias is None else bias.flatten(0, 1)[None]


def relative_positions(
    window: tuple[int, int], device: torch.device | None = None
) -> Int[Tensor, "m m"]:
    """The row of the table of biases for every pair of tokens in a window.

    (di + h - 1) (2 w - 1) + dj + w - 1 for tokens that are di rows and dj columns apart.
    """
    h, w = window
    row = torch.arange(h, device=device).repeat_interleave(w)
    column = torch.arange(w, device=device).repeat(h)
    down = row[:, None] - row[None] + h - 1
    right = column[:, None] - column[None] + w - 1
    return down * (2 * w - 1) + right


def _walls(
    sides: tuple[int, int], window: tuple[int, int], shifts: tuple[int, ...], like: Tensor
) -> Tensor:
    """[n, m, m]: 0 between tokens that were in one region before the roll, else `WALL`."""
    regions = []
    for side, size, shift in zip(sides, window, shifts, strict=True):
        place = torch.arange(side, device=like.device)
        regions.append((place >= side - size).long() + (place >= side - shift).long())
    label = (3 * regions[0][:, None] + regions[1])[None, ..., None]
    label = cut(label, window)[0, :, :, 0]
    apart = label[:, :, None] != label[:, None]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, WALL)
