"""PAROAttention: every head in the order of axes in which its attention is blockwise.

- `orders.py`: orders of the axes of a grid; `metrics.py`: how blockwise a head is in each
- `calibrate.py`: from samples to a plan; `plan.py`: the plan, saved and loaded
- `attention.py`: attention in these orders, which is that of `ops/block_sparse` inside
- `quantise.py`: int8 and int4 scores, SageAttention's; `quantised.py`: weights and values too
- `reference.py`: the equations; `card.py`
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from regard.core.checks import check_integer, check_qkv, reject, words
from regard.ops.paro.attention import axis_order_attention
from regard.ops.paro.calibrate import calibrate_paro, forced_blocks, keep
from regard.ops.paro.metrics import choose_order, statistics_of, statistics_of_map
from regard.ops.paro.orders import axis_orders, codes_of, permute_heads, unpermute_heads
from regard.ops.paro.plan import ParoPlan
from regard.ops.paro.quantise import (
    dequantise_rows,
    int8_scores,
    integer_product,
    quantise_rows,
    sage_attention,
    sage_quantise,
)

__all__ = [
    "ParoPlan",
    "axis_order_attention",
    "axis_orders",
    "calibrate_paro",
    "choose_order",
    "codes_of",
    "dequantise_rows",
    "forced_blocks",
    "int8_scores",
    "integer_product",
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


def paro_attention(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b hk l d"],
    v: Float[Tensor, "b hk l dv"],
    plan: ParoPlan,
    *,
    bucket: int = 0,
    quant: str | None = None,
    smooth_k: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h l dv"]:
    """`axis_order_attention` by a plan that was calibrated and may come from a file.

        o = axis_order_attention(q, k, v, plan.codes, plan.masks[bucket], ...)

    Args:
        q, k, v: [B, H, T, D], [B, Hk, T, D], [B, Hk, T, Dv], T those of the plan's grid and text.
        plan: for this grid and these heads.
        bucket: which of the plan's masks.
        quant, smooth_k, scale, impl: of `axis_order_attention`.

    Precision: float32 (float64 for float64 inputs); integers exact.
    Cost: O(density T^2 (D + Dv)) time, and O(T (D + Dv)) for the permutations.
    Source: PAROAttention, arXiv 2506.16054, 2025.
    Limits: not causal; no gradient with `quant`.
    Raises: TypeError, ValueError naming the argument; ValueError for a plan of another grid.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 64, 8)
    >>> plan = calibrate_paro([(q, k)], (4, 4, 4), block=16, density=0.5)
    >>> paro_attention(q, k, v, plan, quant="int8").shape
    torch.Size([1, 2, 64, 8])
    """
    op = "paro_attention"
    sizes = check_qkv(op, q, k, v)
    if not isinstance(plan, ParoPlan):
        raise reject(op, "plan", "a ParoPlan", words(type(plan).__name__), kind=TypeError)
    if plan.length != sizes.T or plan.length != sizes.S:
        made = f"for a call of {plan.length} queries and keys, those of its grid {plan.grid}"
        raise reject(op, "plan", made, words(f"{sizes}"))
    if plan.masks.shape[1] != sizes.H:
        raise reject(op, "plan", f"for {sizes.H} heads", words(f"one for {plan.masks.shape[1]}"))
    check_integer(op, "bucket", bucket, least=0)
    if bucket >= len(plan.masks):
        raise reject(op, "bucket", f"in [0, {len(plan.masks)})", bucket)
    return axis_order_attention(
        q, k, v, plan.codes.to(q.device), plan.masks[bucket : bucket + 1].to(q.device),
        grid=plan.grid, text=plan.text, block=plan.block, quant=quant, smooth_k=smooth_k,
        scale=scale, impl=impl,
    )  # fmt: skip
