"""Attention of the blocks of a map to a window with a halo around them: HaloNet's."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from regard.core.accumulate import rows_by
from regard.core.checks import (
    FLOATS,
    check_choice,
    check_flag,
    check_integer,
    check_shape,
    name_of,
    reject,
)
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.ops.block_sparse import native
from regard.ops.window.blocks import halo_blocks
from regard.ops.window.blocks_native import halo_boxes, marked, remainders

INDICES = ("timm", "exact")


def halo_attention(
    q: Float[Tensor, "b n i j d"],
    k: Float[Tensor, "b n h w d"],
    v: Float[Tensor, "b n h w dv"],
    rel_h: Float[Tensor, "r d"] | None,
    rel_w: Float[Tensor, "r d"] | None,
    *,
    block: int,
    halo: int,
    stride: int = 1,
    mask_padding: bool = False,
    scale_rel: bool = False,
    rel_index: str = "timm",
) -> Float[Tensor, "b n i j dv"]:
    """The pixels of a block all attend to one window: the block and a halo around it.

        o_i = sum_j softmax_j(D ** -0.5 q_i . k_j + q_i . (rel_h[r] + rel_w[c])) v_j

    over the win x win places j of the window, win = block + 2 halo; r = j_y - i_y + win - 1 and
    c = j_x - i_x + win - 1 with j counted in the window and i in the block. Beyond the map there
    are zeros, with a score of their relative term alone, which take their share of the weights.

    Shapes: [B, H, T, D] with T a map: q [B, H, h / stride, w / stride, D] (rounded up), k
    [B, H, h, w, D], v [B, H, h, w, Dv] -> [B, H, h / stride, w / stride, Dv]. k and v may belong
    to another map than q. Sides need not be multiples of the block.

    Args:
        rel_h, rel_w: [2 win - 1, D], for all heads; both None leaves the relative term out.
        block: side of a block in keys; a multiple of `stride`.
        halo: places on each side of it, at least 0.
        stride: queries are those of every so many rows and columns.
        mask_padding: what lies beyond the map is not seen at all.
        scale_rel: the relative term is multiplied by D ** -0.5, too.
        rel_index: with a stride, "timm" counts i in queries, as published weights have it;
            "exact" in keys (stride i), so that a row of a table is a displacement.

    Precision: scores, weights and sums in float32 (float64 for float64 inputs).
    Cost: O(T win^2 (D + 2 win + Dv) / stride^2) time. Memory: O(T (D + 2 win + Dv)) and 4 MB.
    Source: HaloNet (arXiv 2103.12731, 2021) as timm has it, whose layer is matched to 1e-5 in
    outputs and 1e-4 in gradients.
    Limits: differentiable once.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> q, k, v = torch.randn(3, 1, 2, 12, 18, 16)
    >>> halo_attention(q, k, v, None, None, block=6, halo=2).shape
    torch.Size([1, 2, 12, 18, 16])
    """
    op = "halo_attention"
    if rel_h is None or rel_w is None:
        q, k, v = cast_for_autocast(q, k, v)
    else:
        q, k, v, rel_h, rel_w = cast_for_autocast(q, k, v, rel_h, rel_w)
    for name, number, least in (("block", block, 1), ("halo", halo, 0), ("stride", stride, 1)):
        check_integer(op, name, number, least=least)
    check_flag(op, "mask_padding", mask_padding)
    check_flag(op, "scale_rel", scale_rel)
    check_choice(op, "rel_index", rel_index, INDICES)
    if block % stride:
        raise reject(op, "stride", f"a divisor of block, {block}", stride)
    _check(op, q, k, v, rel_h, rel_w, stride, 2 * (block + 2 * halo) - 1)
    with without_autocast(q):
        given, (B, n, H, W, D) = q, k.shape
        dtype = compute_dtype(q.dtype)
        rows, columns, down, right = *q.shape[2:4], -(-H // block), -(-W // block)
        around = (halo, right * block - W + halo, halo, down * block - H + halo)
        k, v = (pad(x.to(dtype).flatten(0, 1), (0, 0, *around)) for x in (k, v))
        side = block // stride
        q = q.to(dtype).flatten(0, 1)
        q = pad(q, (0, 0, 0, right * side - columns, 0, down * side - rows))
        q = q.view(-1, down, side, right, side, D).transpose(2, 3).contiguous()
        boxes = native.unavailable(q, k) is None and dtype == torch.float32
        # C scales: torch would divide it between its threads, which then spin beside ours.
        scaled, scale = (q, D**-0.5) if boxes else (q * D**-0.5, 1.0)
        window = block + 2 * halo
        if rel_h is not None and rel_w is not None:
            asking = scaled if scale_rel else q
            step = stride if rel_index == "exact" else 1
            share = 1.0 if scale_rel else scale  # of the tables, which are small
            by_row, by_column = (
                _placed(table.to(dtype) / share, side, window, step) for table in (rel_h, rel_w)
            )
            high = torch.einsum("nuvyxd,yjd->nuvyxj", asking, by_row)
            wide = torch.einsum("nuvyxd,xjd->nuvyxj", asking, by_column)
            if boxes:
                high, wide = remainders(high, block, 1), remainders(wide, block, 2)
                k = marked(k, window)
            scaled = torch.cat((scaled, high, wide), 5)
        inside = [H, W] if mask_padding else [-1, -1]
        if boxes:
            size = [down * block, right * block]
            rows_of = (scaled.flatten(1, 4), k.flatten(1, 2), v.flatten(1, 2))
            out = halo_boxes(*(x[:, None] for x in rows_of), block, halo, size, inside, scale)[0]
        else:
            out = halo_blocks(scaled.flatten(3, 4), k, v, block, halo, inside)[0]
        out = out.view(-1, down, right, side, side, v.shape[3]).transpose(2, 3)
        out = out.reshape(B, n, down * side, right * side, v.shape[3])
        return out[:, :, :rows, :columns].to(given.dtype)


def _placed(table: Tensor, side: int, window: int, step: int) -> Tensor:
    """[queries, places of the window, D]: the row of the table for each pair."""
    query, place = torch.arange(side, device=table.device), torch.arange(window)
    index = place.to(table.device) - step * query[:, None] + window - 1
    return rows_by(table, index.flatten()).view(side, window, -1)


def _check(op: str, q: Any, k: Any, v: Any, rel_h: Any, rel_w: Any, stride: int, rows: int) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise reject(op, name, "a torch.Tensor", value, kind=TypeError)
        if value.dim() != 5 or 0 in value.shape[1:]:
            accepted = "[batch, heads, height, width, channels], none of the last four 0"
            raise reject(op, name, accepted, value)
        if value.dtype not in FLOATS or value.dtype != q.dtype:
            accepted = f"of q's dtype, one of {', '.join(map(name_of, FLOATS))}"
            raise reject(op, name, accepted, value, kind=TypeError)
    B, n, H, W, D = k.shape
    check_shape(op, "q", q, (B, n, -(-H // stride), -(-W // stride), D), q)
    check_shape(op, "k", k, (B, n, H, W, D), q)
    check_shape(op, "v", v, (B, n, H, W, v.shape[4]), q)
    if (rel_h is None) != (rel_w is None):
        raise reject(op, "rel_w", "given exactly where rel_h is", rel_w)
    for name, table in (("rel_h", rel_h), ("rel_w", rel_w)):
        if table is not None:
            check_shape(op, name, table, (rows, D), q)
