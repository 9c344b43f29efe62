"""Pyramid sparse attention: important blocks of keys finely, others coarsely or not at all.

- `importance.py`: how much a block of queries cares for a block of keys
- `assignment.py`: from importance to levels; `similarity.py`: how coarse keys may be
- `levels.py`: the whole policy
- `order.py`: orders of tokens in which blocks are compact
- `presets.py`: the published configurations
- `reference.py`: the equations; `card.py`. The attention is that of `ops/block_sparse`
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import (
    check_choice,
    check_flag,
    check_float_operand,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
    check_shape,
    reject,
)
from regard.core.dispatch import choose
from regard.core.precision import cast_for_autocast, without_autocast
from regard.ops.block_sparse.forms import FORMS, Call
from regard.ops.block_sparse.pyramid import TAILS
from regard.ops.pyramid_sparse.levels import pyramid_levels

__all__ = ["pyramid_attention", "pyramid_levels"]

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def pyramid_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    levels: Int[Tensor, "#b #h nq nk"],
    *,
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, " b #h s"] | None = None,
    tail: str = "replicate",
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Every block of queries attends to each block of keys at full resolution, pooled, or not.

        o_t = sum_r softmax_r(scale q_t . K^l_r + ln l) V^l_r

    over the rows r of the blocks j with level l = levels[t // block_q, j] > 0: K^l and V^l hold
    the means of l keys and of l values, and ln l lets one pooled key weigh as l equal ones. This
    is `block_sparse_attention` as the paper's kernels count: `tail="replicate"` by default.

    Args:
        q, k, v: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv]; H a multiple of Hk.
        levels: integers in {0, 1, 2, 4, 8}, [B or 1, H or Hk or 1, ceil(T / block_q),
            ceil(S / block_k)], from `pyramid_levels` or by hand. No gradient.
        causal: query i stands at key i + S - T; of a pooled row all tokens must lie in its past.
        scale: None is D ** -0.5; a number, a tensor [] or one per head [H].
        key_mask: bool [B, S], True = real key; a masked key is in no mean and counts nowhere.
        key_bias: [B, 1 | Hk | H, S], added to the scores of a key.
        tail: what fills the last group of a pooled block behind the last key: "replicate", the
            last key again, as published; "exact", nothing.
        impl: "auto", "eager" or "reference" (dense scores, differentiable twice).

    A query with nothing to attend to gives 0 (the released kernels: 0/0).

    Precision: scores, weights and sums in float32 (float64 for float64 inputs).
    Cost: O(density T S (D + Dv)) time. Memory: O((S + T)(D + Dv)) and 16 MB; no T x S tensor.
    Source: Pyramid Sparse Attention, arXiv 2512.04025. Outputs are matched to 2e-5, gradients to
    1e-4, except for small pooled blocks, of which the released new kernel reads keys that are not
    theirs. Masks, biases, grouped queries and T != S are ours.
    Limits: differentiable once. Gradients of keys are summed in no fixed order on a GPU.
    Raises: ValueError, TypeError for arguments that do not fit; ValueError for a level outside
    the set.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 512, 16)
    >>> levels = pyramid_levels(q, k, ratios={1: 0.5, 8: 1.0})
    >>> pyramid_attention(q, k, v, levels).shape
    torch.Size([1, 2, 512, 16])
    """
    op = "pyramid_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(op, q, k, v)
    check_flag(op, "causal", causal)
    check_scale(op, scale, sizes, q)
    check_key_mask(op, key_mask, sizes, q)
    check_float_operand(op, "key_bias", key_bias, (sizes.B, (1, sizes.Hk, sizes.H), sizes.S), q)
    check_integer(op, "block_q", block_q)
    check_integer(op, "block_k", block_k)
    check_choice(op, "tail", tail, TAILS)
    if not isinstance(levels, Tensor) or levels.dtype not in _INTEGERS:
        raise reject(op, "levels", "a tensor of integers", levels, kind=TypeError)
    blocks = -(-sizes.T // block_q), -(-sizes.S // block_k)
    check_shape(op, "levels", levels, ((1, sizes.B), (1, sizes.Hk, sizes.H), *blocks), q)
    call = Call(
        q, k, v, levels, False, block_q, block_k, causal, scale, key_mask, key_bias, None,
        tail == "replicate",
    )  # fmt: skip
    form = choose(op, FORMS, impl, call)
    with without_autocast(q):
        return form.run(call).to(q.dtype)
