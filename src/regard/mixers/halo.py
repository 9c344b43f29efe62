"""The layers of HaloNet: blocks of an image attend to themselves and a halo around them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from regard.core.checks import check_flag, check_integer, check_number, reject
from regard.ops.window.halo import halo_attention


class RelativePosition2d(nn.Module):
    """Tables of rows and columns, [2 win - 1, D]: what a query adds to a score at a place."""

    def __init__(self, window: int, head_dim: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=head_dim**-0.5)


class HaloAttention(nn.Module):
    """Every block of an image attends to itself and a halo, with relative positions.

        q = W_q x,  k, v = W_kv x,  y = halo_attention(q, k, v, height_rel, width_rel)

    There is no projection of the output: a convolution follows in the network.

    Args:
        dim, dim_out: channels of x and of y (None: as many).
        stride: 1, or 2: queries are those of every second row and column.
        heads: H. head_dim: D of queries and keys; None is qk_ratio * dim_out / heads, with
            qk_ratio * dim_out rounded to a multiple of 8. Values have dim_out / heads.
        block, halo: sides in pixels.
        qkv_bias: whether the projections have one; the zeros around the map never have.
        avg_down: with stride 2, all queries, and means of 2 x 2 outputs. It is so, too, if the
            block is odd.
        scale_rel, mask_padding, rel_index: of `regard.ops.halo_attention`.
        fill: an image whose sides are no multiples of the block is filled up with zeros after the
            projection, and the result is cut. False refuses it, as timm does.

    Shapes: x [B, C, h, w] -> [B, dim_out, h / stride, w / stride]. The state dict is timm's:
    `q.*` and `kv.*` (1 x 1 convolutions, k and v head by head), `pos_embed.height_rel`,
    `pos_embed.width_rel`.

    Precision, cost: of `regard.ops.halo_attention`.
    Source: HaloNet (arXiv 2103.12731), timm's `HaloAttn`, matched to 1e-5.
    Raises: TypeError, ValueError naming the argument.

    >>> HaloAttention(32, heads=4, block=4, halo=1)(torch.randn(2, 32, 8, 10)).shape
    torch.Size([2, 32, 8, 10])
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        heads: int = 8,
        head_dim: int | None = None,
        block: int = 8,
        halo: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_rel: bool = False,
        mask_padding: bool = False,
        rel_index: str = "timm",
        fill: bool = True,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        dim_out = dim if dim_out is None else dim_out
        for name, number in (("dim", dim), ("dim_out", dim_out), ("heads", heads)):
            check_integer(op, name, number)
        check_integer(op, "block", block)
        check_integer(op, "halo", halo, least=0)
        check_number(op, "qk_ratio", qk_ratio, above=0.0)
        for name, flag in (
            ("qkv_bias", qkv_bias), ("avg_down", avg_down), ("scale_rel", scale_rel),
            ("mask_padding", mask_padding), ("fill", fill),
        ):  # fmt: skip
            check_flag(op, name, flag)
        if stride not in (1, 2):
            raise reject(op, "stride", "1 or 2", stride)
        if rel_index not in ("timm", "exact"):
            raise reject(op, "rel_index", "'timm' or 'exact'", rel_index)
        if dim_out % heads:
            raise reject(op, "dim_out", f"a multiple of heads, {heads}", dim_out)
        if head_dim is None:
            head_dim = divisible(dim_out * qk_ratio) // heads
        check_integer(op, "head_dim", head_dim)
        self.dim, self.dim_out, self.heads, self.head_dim = dim, dim_out, heads, head_dim
        self.block, self.halo, self.fill = block, halo, fill
        self.averaged = stride == 2 and (avg_down or block % 2 == 1)
        self.stride = 1 if self.averaged else stride
        self.options = {
            "scale_rel": scale_rel, "mask_padding": mask_padding, "rel_index": rel_index
        }  # fmt: skip
        inner = heads * head_dim
        self.q = nn.Conv2d(dim, inner, 1, self.stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, inner + dim_out, 1, bias=qkv_bias)
        self.pos_embed = RelativePosition2d(block + 2 * halo, head_dim)
        for layer in (self.q, self.kv):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.dim_out}, heads={self.heads}, block={self.block}, halo={self.halo}"
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """A map of `dim_out` channels."""
        check_image(self, x, self.block, self.fill)
        q, kv = (layer(x).unflatten(1, (self.heads, -1)) for layer in (self.q, self.kv))
        q, kv = (y.permute(0, 1, 3, 4, 2) for y in (q, kv))
        k, v = kv.split((self.head_dim, self.dim_out // self.heads), 4)
        y = halo_attention(
            q, k, v, self.pos_embed.height_rel, self.pos_embed.width_rel, block=self.block,
            halo=self.halo, stride=self.stride, **self.options,
        )  # fmt: skip
        y = y.permute(0, 1, 4, 2, 3).flatten(1, 2)
        return avg_pool2d(y, 2, 2, ceil_mode=True) if self.averaged else y


class RelativeTables2d(nn.Module):
    """The same tables under the names of the layer with an output projection."""

    def __init__(self, window: int, head_dim: int) -> None:
        super().__init__()
        self.rel_height = nn.Parameter(torch.randn(2 * window - 1, head_dim) * head_dim**-0.5)
        self.rel_width = nn.Parameter(torch.randn(2 * window - 1, head_dim) * head_dim**-0.5)


class ProjectedHaloAttention(nn.Module):
    """Halo attention with a projection of the output, which does not see beyond the image.

        q = W_q x,  k, v = W_kv x,  y = W_o halo_attention(q, k, v, ...) + b_o

    with `scale_rel` and `mask_padding`. The layout of lucidrains' halonet-pytorch: `to_q.weight`,
    `to_kv.weight` (all keys, then all values), `to_out.*`, `rel_pos_emb.rel_height`,
    `rel_pos_emb.rel_width`. Its layer masks the real keys and sees the padding; here it is the
    other way round.

    Args:
        dim: C. heads, head_dim: H and D. block, halo: sides in pixels.
        fill: as of `HaloAttention`.

    Shapes: x [B, C, h, w] -> the same.

    Precision, cost: of `regard.ops.halo_attention`.
    Source: HaloNet (arXiv 2103.12731); github.com/lucidrains/halonet-pytorch with its mask
        repaired, matched to 1e-5.
    Raises: TypeError, ValueError naming the argument.

    >>> ProjectedHaloAttention(16, block=4, halo=2)(torch.randn(1, 16, 8, 12)).shape
    torch.Size([1, 16, 8, 12])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        head_dim: int = 64,
        block: int = 8,
        halo: int = 3,
        fill: bool = True,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, number in (("dim", dim), ("heads", heads), ("head_dim", head_dim)):
            check_integer(op, name, number)
        check_integer(op, "block", block)
        check_integer(op, "halo", halo, least=0)
        check_flag(op, "fill", fill)
        self.dim, self.heads, self.block, self.halo, self.fill = dim, heads, block, halo, fill
        inner = heads * head_dim
        self.rel_pos_emb = RelativeTables2d(block + 2 * halo, head_dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        check_image(self, x, self.block, self.fill)
        tokens = x.permute(0, 2, 3, 1)
        q, k, v = (
            y.unflatten(3, (self.heads, -1)).permute(0, 3, 1, 2, 4)
            for y in (self.to_q(tokens), *self.to_kv(tokens).chunk(2, 3))
        )
        y = halo_attention(
            q, k, v, self.rel_pos_emb.rel_height, self.rel_pos_emb.rel_width, block=self.block,
            halo=self.halo, mask_padding=True, scale_rel=True,
        )  # fmt: skip
        return self.to_out(y.permute(0, 2, 3, 1, 4).flatten(3)).permute(0, 3, 1, 2)


def check_image(layer: Any, x: Any, block: int, fill: bool) -> None:
    """[B, C, h, w] of the layer's channels, and multiples of the block if it is not filled up."""
    op = type(layer).__name__
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != layer.dim:
        raise reject(op, "x", f"of shape [batch, {layer.dim}, height, width]", x)
    if not fill and (x.shape[2] % block or x.shape[3] % block):
        accepted = f"of sides that are multiples of block, {block}, where fill=False"
        raise reject(op, "x", accepted, x)


def divisible(number: float, by: int = 8) -> int:
    """The nearest multiple, at least `by` and not more than a tenth below `number`.

    >>> divisible(64 * 0.33), divisible(3), divisible(10)
    (24, 8, 16)
    """
    found = max(by, int(number + by / 2) // by * by)
    return found + by if found < 0.9 * number else found
