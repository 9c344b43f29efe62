"""Attention of every head in its own order of the axes, within a mask of blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import (
    Sizes,
    check_choice,
    check_flag,
    check_integer,
    check_qkv,
    check_scale,
    check_shape,
    reject,
)
from regard.core.dispatch import choose
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.ops.block_sparse.forms import FORMS, Call
from regard.ops.paro.orders import check_grid, inverse, orders_of, take
from regard.ops.paro.quantise import dequantise_rows, quantise_rows
from regard.ops.paro.quantised import attend_quantised

QUANTS = ("int8", "int8_pv", "int4")
_ROWS_Q, _ROWS_K = 32, 64  # rows that share a scale
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def axis_order_attention(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b hk l d"],
    v: Float[Tensor, "b hk l dv"],
    codes: Int[Tensor, " h"],
    kept: Bool[Tensor, "#b #h n n"] | Int[Tensor, "#b #h n n"],
    *,
    grid: tuple[int, ...],
    text: int = 0,
    block: int = 64,
    causal: bool = False,
    quant: str | None = None,
    smooth_k: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h l dv"]:
    """Each head's tokens in its order of the axes; softmax over the blocks that are kept there.

        o = P_h^-1 softmax over kept blocks of (scale P_h q (P_h k)^T) P_h v

    Args:
        q, k, v: [B, H, T, D], [B, Hk, T, D], [B, Hk, T, Dv], T = text + cells in raster order,
            text in front, after rotary embedding and normalisation; H a multiple of Hk.
        codes: integers [H], the order of the axes of every head, as in `codes_of`. No gradient.
        kept: bool or integers [B or 1, H or 1, n, n], n = ceil(T / block): not 0 where a block of
            the permuted sequence, text included, is attended to. No gradient.
        grid, text, block: sizes of the axes, tokens before them, tokens of a block.
        causal: must be False: a grid has no order of time.
        quant: None; "int8": q rounded by 32 rows and k by 64, in the permuted order; "int8_pv":
            the weights and values too, 8 bits; "int4": q and k to -7 .. 7, weights to 0 .. 15 and
            values to -7 .. 7 per block.
        smooth_k: subtracts the mean of the keys, which changes no weight, before rounding.
        scale: None is D ** -0.5; a number, a tensor [] or one per head [H].
        impl: of the block-sparse attention; "int8_pv" and "int4" have one form.

    A query with no kept block gives 0.

    Precision: float32 (float64 for float64 inputs); integers exact.
    Cost: O(density T^2 (D + Dv)) time, and O(T (D + Dv)) for the permutations. Memory:
        O(T (D + Dv)) and that of the block-sparse attention.
    Source: PAROAttention, arXiv 2506.16054, 2025; the released kernels renormalise over kept
        blocks, and so does this. Matched to 2e-5, with int8 to 2e-4.
    Limits: self-attention without a causal form; no gradient with `quant`. Differentiable once.
    Raises: TypeError, ValueError naming the argument; an IndexError or RuntimeError of torch for
        a code outside the set.

    >>> q, k, v = torch.randn(3, 1, 2, 6 * 4, 8)
    >>> kept = torch.eye(3, dtype=torch.bool)[None, None]
    >>> axis_order_attention(q, k, v, torch.tensor([0, 1]), kept, grid=(6, 4), block=8).shape
    torch.Size([1, 2, 24, 8])
    """
    op = "axis_order_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(op, q, k, v)
    _check(op, sizes, q, codes, kept, grid, text, block)
    check_flag(op, "causal", causal)
    if causal:
        raise reject(op, "causal", "False: a grid has no order of time", causal)
    check_flag(op, "smooth_k", smooth_k)
    check_scale(op, scale, sizes, q)
    if quant is not None:
        check_choice(op, "quant", quant, QUANTS)
        operands = (q, k, v, scale) if isinstance(scale, Tensor) else (q, k, v)
        if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
            raise reject(op, "quant", "None where gradients are asked for", quant)
        if quant != "int8" and impl not in ("auto", "eager"):
            raise reject(op, "impl", f'"auto" or "eager" for quant={quant!r}', impl)
    with without_autocast(q):
        dtype = compute_dtype(q.dtype)
        order = orders_of(codes, grid, text, q.device)
        keys = k.to(dtype)
        if smooth_k:
            keys = keys - keys.mean(2, keepdim=True)
        queries, keys, values = (take(x, order) for x in (q.to(dtype), keys, v.to(dtype)))
        if quant is not None:
            top = 7 if quant == "int4" else 127
            queries, keys = (
                dequantise_rows(*quantise_rows(x, rows, top), rows)
                for x, rows in ((queries, _ROWS_Q), (keys, _ROWS_K))
            )
        if quant in ("int8_pv", "int4"):
            factor = sizes.D**-0.5 if scale is None else scale
            if isinstance(factor, Tensor):
                factor = factor.to(dtype).reshape(-1, 1, 1)
            out = attend_quantised(queries * factor, keys, values, kept != 0, block, quant)
        else:
            call = Call(
                queries, keys, values, kept != 0, False, block, block, False,
                scale, None, None, None, False,
            )  # fmt: skip
            out = choose(op, FORMS, impl, call).run(call)
        return take(out, inverse(order)).to(q.dtype)


def _check(
    op: str, sizes: Sizes, like: Tensor, codes: Any, kept: Any, grid: Any, text: Any, block: Any
) -> None:
    check_grid(op, grid, text)
    check_integer(op, "block", block)
    length = text + math.prod(grid)
    if not length == sizes.T == sizes.S:
        cells = f"of {sizes.T} queries and {sizes.S} keys, equally many, with text {text}"
        raise reject(op, "grid", cells, grid)
    if not isinstance(codes, Tensor) or codes.dtype not in _INTEGERS:
        raise reject(op, "codes", "a tensor of integers", codes, kind=TypeError)
    check_shape(op, "codes", codes, (sizes.H,), like)
    if not isinstance(kept, Tensor) or kept.dtype not in (torch.bool, *_INTEGERS):
        raise reject(op, "kept", "a tensor of bool or integers", kept, kind=TypeError)
    n = -(-length // block)
    check_shape(op, "kept", kept, ((1, sizes.B), (1, sizes.H), n, n), like)
