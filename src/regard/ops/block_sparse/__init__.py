"""Attention to chosen blocks of keys, each at a chosen resolution; the engine of sparse attention.

- `pyramid.py`: keys and values at several resolutions, as rows
- `lists.py`: from a plan to the rows that each block of queries attends to
- `eager.py`: attention to lists of rows, and its gradient; `registered.py`: as torch operators
- `native/`, `triton/`: the same compiled, for CPUs and GPUs
- `plan.py`: `BlockPlan`, a plan that can be checked, measured, drawn, saved
- `reference.py`: the equations; `forms.py`: which form serves a call; `card.py`
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import (
    Sizes,
    check_choice,
    check_flag,
    check_float_operand,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
    check_shape,
    check_window,
    reject,
)
from regard.core.dispatch import choose
from regard.core.precision import cast_for_autocast, without_autocast
from regard.ops.block_sparse.forms import FORMS, Call
from regard.ops.block_sparse.plan import BlockPlan
from regard.ops.block_sparse.pyramid import TAILS

__all__ = ["BlockPlan", "block_sparse_attention", "selected_attention"]

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def block_sparse_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    levels: Int[Tensor, "#b #h nq nk"] | Bool[Tensor, "#b #h nq nk"],
    *,
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, " b #h s"] | None = None,
    window: tuple[int, int] | None = None,
    tail: str = "exact",
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Every block of queries attends to the blocks of keys that a plan gives it, coarsely or not.

        o_i = sum_r w_ir v_r,   w_ir = softmax over r of (scale q_i . k_r + b_r)

    where r runs over the rows of the blocks j with level l = levels[i // block_q, j] > 0 that
    query i sees. Level 1: the tokens of the block. Level l = 2, 4, 8: one row for every l
    tokens, the means of their keys and of their values, which counts as all of them:

        b_r = log sum_t exp(key_bias_t)      (ln l without biases)

    so that a group of equal keys weighs exactly what its tokens weigh. The means are weighted
    by exp(key_bias_t). Level 0 skips the block. A query with nothing to attend to gives 0.

    Args:
        q, k, v: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv]; H a multiple of Hk.
        levels: integers in {0, 1, 2, 4, 8}, [B or 1, H or Hk or 1, ceil(T / block_q),
            ceil(S / block_k)]; only levels that divide block_k. Plain data: another plan
            compiles nothing. No gradient. Or bool, True for level 1: where nothing is pooled a
            GPU starts fewer kernels.
        causal: query i stands at key i + S - T and sees what ends there or before: of a pooled
            row all tokens must lie in its past.
        scale: None is D ** -0.5; a number, a tensor [] or one per head [H].
        key_mask: bool [B, S], True = real key; a masked key is in no mean and counts nowhere.
        key_bias: [B, 1 | Hk | H, S], added to the scores of a key.
        window: (left, right) tokens around the query's position, -1 unbounded, within the plan;
            a pooled row is seen if all of it lies inside.
        tail: what fills the last group of a pooled block behind the last key: "exact", nothing;
            "replicate", the last key again, as the released pyramid kernels have it.
        impl: "auto", "native" (CPU), "triton" (GPU), "eager" or "reference" (dense scores,
            differentiable twice).

    Precision: scores, weights and sums in float32 (float64 for float64 inputs). A plan of ones
    equals dense attention to 1e-6 in float32.
    Cost: O(density T S (D + Dv)) time. Memory: O((S + T)(D + Dv)) and 16 MB of gathered rows and
    scores; no T x S tensor. The backward computes the weights again.
    Source: levels and ln l are those of Pyramid Sparse Attention, arXiv 2512.04025; its outputs
    are matched to 2e-5 with `tail="replicate"`. Weighted means, masks, biases, windows and
    T != S are ours.
    Limits: differentiable once. On a GPU the eager form sums gradients of keys in no fixed
    order, the Triton form in one; that form has heads of up to 128 channels, `tail="exact"`,
    and no sizes that the host waits for.
    Raises: ValueError, TypeError for arguments that do not fit; ValueError for a level outside
    the set (the Triton form, which does not wait for the device, skips such a block).

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 256, 16)
    >>> near = torch.tensor([[1, 1, 2, 4], [1, 1, 1, 2], [2, 1, 1, 1], [4, 2, 1, 1]])
    >>> block_sparse_attention(q, k, v, near[None, None], block_q=64, block_k=64).shape
    torch.Size([1, 2, 256, 16])
    """
    op = "block_sparse_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = _check(op, q, k, v, block_q, block_k, causal, scale, key_mask, key_bias, window)
    check_choice(op, "tail", tail, TAILS)
    nq, nk = -(-sizes.T // block_q), -(-sizes.S // block_k)
    _check_plan(op, "levels", levels, sizes, (nq, nk), q, (*_INTEGERS, torch.bool))
    call = Call(
        q, k, v, levels, False, block_q, block_k, causal, scale, key_mask, key_bias, window,
        tail == "replicate",
    )  # fmt: skip
    return _run(op, call, impl)


def selected_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    selected: Int[Tensor, "#b #h nq n"],
    *,
    block: int,
    block_q: int = 1,
    causal: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, " b #h s"] | None = None,
    window: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Every query, or block of queries, attends to the blocks of keys whose indices it is given.

        o_i = sum_j softmax_j(scale q_i . k_j + key_bias_j) v_j,
        j in the blocks selected[i // block_q] that query i sees

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv].

    Args:
        selected: integers, [B or 1, H or Hk or 1, ceil(T / block_q), n]: key block m holds the
            tokens [m block, (m + 1) block). -1 names none; a block named twice counts once.
            No gradient.
        block: keys in a block; 1 selects single tokens.
        block_q: queries that share a row of `selected`.

    The other arguments are those of `block_sparse_attention`.

    Precision: float32 (float64 for float64 inputs) as there.
    Cost: O(T n block (D + Dv)) time; memory as there.
    Source: the attention of SSA (arXiv 2511.20102), whose outputs and gradients are matched to
    2e-5 and 1e-4, of NSA and of MoBA.
    Limits: those of `block_sparse_attention`.
    Raises: ValueError, TypeError for arguments that do not fit; ValueError for an index outside
    of the blocks (the Triton form takes it for -1).

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 64, 16)
    >>> own = (torch.arange(64) // 16).view(1, 1, 64, 1)
    >>> selected_attention(q, k, v, own, block=16, causal=True).shape
    torch.Size([1, 2, 64, 16])
    """
    op = "selected_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = _check(op, q, k, v, block_q, block, causal, scale, key_mask, key_bias, window, "block")
    width = selected.shape[-1] if isinstance(selected, Tensor) and selected.dim() else 1
    _check_plan(op, "selected", selected, sizes, (-(-sizes.T // block_q), width), q)
    call = Call(
        q, k, v, selected, True, block_q, block, causal, scale, key_mask, key_bias, window, False
    )
    return _run(op, call, impl)


def _run(op: str, call: Call, impl: str) -> Tensor:
    form = choose(op, FORMS, impl, call)
    with without_autocast(call.q):
        return form.run(call).to(call.q.dtype)


def _check(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    block_q: Any,
    block_k: Any,
    causal: Any,
    scale: Any,
    key_mask: Any,
    key_bias: Any,
    window: Any,
    name_of_block: str = "block_k",
) -> Sizes:
    sizes = check_qkv(op, q, k, v)
    check_flag(op, "causal", causal)
    check_scale(op, scale, sizes, q)
    check_key_mask(op, key_mask, sizes, q)
    check_float_operand(op, "key_bias", key_bias, (sizes.B, (1, sizes.Hk, sizes.H), sizes.S), q)
    if window is not None:
        check_window(op, window)
    check_integer(op, "block_q", block_q)
    check_integer(op, name_of_block, block_k)
    return sizes


def _check_plan(
    op: str, name: str, plan: Any, sizes: Sizes, shape: tuple[int, int], like: Tensor,
    kinds: tuple[torch.dtype, ...] = _INTEGERS,
) -> None:  # fmt: skip
    if not isinstance(plan, Tensor) or plan.dtype not in kinds:
        raise reject(op, name, "a tensor of integers", plan, kind=TypeError)
    check_shape(op, name, plan, ((1, sizes.B), (1, sizes.Hk, sizes.H), *shape), like)
