"""PAROAttention: every head in the order of axes in which its attention is blockwise.

- `orders.py`: orders of the axes of a grid; `metrics.py`: how blockwise a head is in each
- `calibrate.py`: from samples to a plan; `plan.py`: the plan, saved and loaded
- `quantise.py`: int8 and int4 scores, SageAttention's; `quantised.py`: weights and values too
The attention itself is that of `ops/block_sparse`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from regard.core.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_qkv,
    check_scale,
    reject,
    words,
)
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.ops.block_sparse import block_sparse_attention
from regard.ops.paro.calibrate import calibrate_paro, forced_blocks, keep
from regard.ops.paro.metrics import choose_order, statistics_of, statistics_of_map
from regard.ops.paro.orders import axis_orders, codes_of, permute_heads, unpermute_heads
from regard.ops.paro.plan import ParoPlan
from regard.ops.paro.quantise import (
    dequantise_rows,
    quantise_rows,
    sage_attention,
    sage_quantise,
)
from regard.ops.paro.quantised import attend_quantised

__all__ = [
    "ParoPlan",
    "axis_orders",
    "calibrate_paro",
    "choose_order",
    "codes_of",
    "dequantise_rows",
    "forced_blocks",
    "keep",
    "paro_attention",
    "permute_heads",
    "quantise_rows",
    "sage_attention",
    "sage_quantise",
    "statistics_of",
    "statistics_of_map",
    "unpermute_heads",
]

QUANTS = ("int8", "int8_pv", "int4")
_ROWS_Q, _ROWS_K = 32, 64


def paro_attention(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b hk l d"],
    v: Float[Tensor, "b hk l dv"],
    plan: ParoPlan,
    *,
    bucket: int = 0,
    quant: str | None = None,
    smooth_k: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h l dv"]:
    """Each head's tokens in its order of the axes; softmax over the blocks that its plan keeps.

        o = P_h^-1 softmax over kept blocks of (scale P_h q (P_h k)^T) P_h v

    Args:
        q, k, v: [B, H, T, D], [B, Hk, T, D], [B, Hk, T, Dv], T = text + cells in raster order,
            after rotary embedding and normalisation; H a multiple of Hk.
        plan: for this grid and these heads.
        bucket: which of the plan's masks.
        quant: None; "int8": q rounded by 32 rows and k by 64, in the permuted order; "int8_pv":
            the weights and values too, 8 bits; "int4": q and k to -7 .. 7, weights to 0 .. 15 and
            values to -7 .. 7 per block.
        smooth_k: subtracts the mean of the keys, which changes no weight, before rounding.
        scale: None is D ** -0.5.
        impl: of the block-sparse attention; "int8_pv" and "int4" have one form.

    A query with no kept block gives 0.

    Precision: float32 (float64 for float64 inputs); integers exact.
    Cost: O(density T^2 (D + Dv)) time, and O(T (D + Dv)) for the permutations.
    Source: PAROAttention, arXiv 2506.16054; the released kernels renormalise over kept blocks,
    and so does this. Matched to 2e-5, with int8 to 2e-4.
    Limits: not causal; no gradient with `quant`.
    Raises: TypeError, ValueError naming the argument; ValueError for a plan of another grid.

    >>> q, k, v = torch.randn(3, 1, 2, 64, 8)
    >>> plan = calibrate_paro([(q, k)], (4, 4, 4), block=16, density=0.5)
    >>> paro_attention(q, k, v, plan, quant="int8").shape
    torch.Size([1, 2, 64, 8])
    """
    op = "paro_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(op, q, k, v)
    if not isinstance(plan, ParoPlan):
        raise reject(op, "plan", "a ParoPlan", words(type(plan).__name__), kind=TypeError)
    if plan.length != sizes.T or plan.length != sizes.S:
        made = f"of {plan.length} queries and keys, those of the plan's grid {plan.grid}"
        raise reject(op, "plan", made.replace("of", "for a call of", 1), words(f"{sizes}"))
    if plan.masks.shape[1] != sizes.H:
        raise reject(op, "plan", f"for {sizes.H} heads", words(f"one for {plan.masks.shape[1]}"))
    check_integer(op, "bucket", bucket, least=0)
    if bucket >= len(plan.masks):
        raise reject(op, "bucket", f"in [0, {len(plan.masks)})", bucket)
    check_flag(op, "smooth_k", smooth_k)
    if isinstance(scale, Tensor):
        raise reject(op, "scale", "None or a number", scale, kind=TypeError)
    check_scale(op, scale, sizes, q)
    if quant is not None:
        check_choice(op, "quant", quant, QUANTS)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise reject(op, "quant", "None where gradients are asked for", quant)
    factor = sizes.D**-0.5 if scale is None else float(scale)
    with without_autocast(q):
        dtype = compute_dtype(q.dtype)
        group = sizes.H // sizes.Hk
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        queries, keys, values = (
            permute_heads(x.to(dtype), plan.codes, plan.grid, plan.text) for x in (q, k, v)
        )
        if smooth_k:
            keys = keys - keys.mean(2, keepdim=True)
        if quant is not None:
            top = 7 if quant == "int4" else 127
            queries, keys = (
                dequantise_rows(*quantise_rows(x, rows, top), rows)
                for x, rows in ((queries, _ROWS_Q), (keys, _ROWS_K))
            )
        mask = plan.masks[bucket].to(q.device)
        if quant in ("int8_pv", "int4"):
            if impl not in ("auto", "eager"):
                raise reject(op, "impl", f'"auto" or "eager" for quant={quant!r}', impl)
            out = attend_quantised(queries, keys, values, mask, plan.block, factor, quant)
        else:
            out = block_sparse_attention(
                queries, keys, values, mask[None].to(torch.int8), block_q=plan.block,
                block_k=plan.block, scale=factor, impl=impl,
            )  # fmt: skip
        return unpermute_heads(out, plan.codes, plan.grid, plan.text).to(q.dtype)
