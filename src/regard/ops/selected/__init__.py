"""Every query attends to the blocks of keys that matter most to it: SSA, NSA, MoBA.

- `selection.py`: the importance of blocks, and the choice
- `forms.py`: which form serves a call; the attention itself is that of `ops/block_sparse`
- `nsa.py`: with a compressed and a window branch beside it
- `reference.py`: the equations; `card.py`
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.cache import KVCache
from regard.core.checks import (
    Sizes,
    check_flag,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
    check_state,
    reject,
)
from regard.core.dispatch import choose
from regard.core.packed import check_packed, run_packed, spans
from regard.core.precision import cast_for_autocast, without_autocast
from regard.ops.selected.forms import FORMS, Call, select
from regard.ops.selected.nsa import nsa_attention

__all__ = ["block_topk", "block_topk_attention", "nsa_attention"]


def block_topk(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    *,
    block: int,
    count: int,
    causal: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
) -> Int[Tensor, "b hk t n"]:
    """The blocks of keys that matter most to every query, one choice for a group of heads.

        m_n = mean of the keys of block n
        p_n = exp(scale q . m_n) / sum over complete blocks n' of exp(scale q . m_n')
        I_n = sum of p_n over the query heads of a key head

    A block is complete for a query that sees all of it. Of the blocks before the query's own the
    most important are taken; its own, which is always taken, is one of the `count`.

    Args:
        q, k: [B, H, T, D], [B, Hk, S, D]; H a multiple of Hk. Queries are aligned with the end
            of the keys.
        block: keys in a block; the last one may be shorter.
        count: blocks per query, rounded up to a power of two as in the released kernels.
        causal: only True.
        scale: None is D ** -0.5; a number, a tensor [] or one per head [H].
        key_mask: bool [B, S], True = real key: blocks are then counted in real keys only.

    Returns:
        indices [B, Hk, T, n], int64, in falling importance, -1 where there are fewer blocks; for
        `selected_attention(..., block=block, causal=True)`. No gradient.

    Precision: means and scores in float32 (float64 for float64 inputs).
    Cost: O(T S D / block) time; half a million scores are held at a time.
    Source: Shen et al. 2025, arXiv 2511.20102, whose choices are matched exactly; the gating of
        MoBA (arXiv 2502.13189) shared by a group.
    Limits: blocks of equal importance are taken in no order that is promised.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> q, k = torch.randn(2, 1, 2, 40, 8)
    >>> block_topk(q, k, block=8, count=2)[0, 0, :9, 0].tolist()  # the own block is first
    [0, 0, 0, 0, 0, 0, 0, 0, 1]
    """
    op = "block_topk"
    q, k = cast_for_autocast(q, k)
    sizes = check_qkv(op, q, k, k)
    check_choice_of_blocks(op, sizes, q, block, count, causal, scale, key_mask)
    with without_autocast(q):
        return select(Call(q, k, k, block, count, scale, key_mask))[0]


def block_topk_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    block: int = 64,
    count: int = 16,
    causal: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    state: KVCache | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Every query attends to its own block of keys and to the most important ones before it.

        o_i = sum_j softmax_j(scale q_i . k_j) v_j,   j <= i in the blocks of block_topk(q, k)_i

    The sparse stream of SSA; with `block_topk`, which says how blocks are chosen, the gating of
    MoBA shared by a group of heads.

    Args:
        q, k, v: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv]; H a multiple of Hk.
        block, count: keys in a block, and blocks per query, a power of two or rounded up to one.
            With count block >= S it is softmax attention.
        causal: only True; the last query sees all keys.
        scale: None is D ** -0.5; a number, a tensor [] or one per head [H]. Its gradient is that
            of the attention; the choice has none.
        key_mask: bool [B, S], True = real key. Blocks are counted in real keys, so rows may be
            padded on either side.
        cu_seqlens: int32 offsets of packed sequences (B = 1), each with blocks of its own.
        state: the `KVCache` of the tokens so far; k, v, key_mask are those of new tokens.
        return_state: also return the cache that contains this call's keys.
        impl: "auto", "eager" or "reference" (query by query).

    Returns: out [B, H, T, Dv], or (out, state).

    Precision: means, scores, weights and sums in float32 (float64 for float64 inputs).
    Cost: O(T S D / block) for the choice, O(T count block (D + Dv)) for the attention; memory
        O((T + S)(D + Dv) + T count) and 16 MB. A decoding step averages only blocks that it
        completes (without masks).
    Source: Shen et al., "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention
        Outputs in Feature Space", 2025, arXiv 2511.20102; choices matched exactly, outputs to
        2e-5, gradients to 1e-4.
    Limits: differentiable once (impl="reference": any number of times). As in the paper a choice
        depends on q and k, but sends them no gradient.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 64, 8)
    >>> out = block_topk_attention(q, k, v, block=8, count=4)
    >>> _, state = block_topk_attention(
    ...     q[:, :, :63], k[:, :, :63], v[:, :, :63], block=8, count=4, return_state=True
    ... )
    >>> last = [x[:, :, 63:] for x in (q, k, v)]
    >>> step = block_topk_attention(*last, block=8, count=4, state=state)
    >>> torch.allclose(step, out[:, :, 63:], atol=1e-6)
    True
    """
    op = "block_topk_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(op, q, k, v)
    check_choice_of_blocks(op, sizes, q, block, count, causal, scale, key_mask)
    check_flag(op, "return_state", return_state)
    check_state(op, state, KVCache)
    check_packed(op, cu_seqlens, None, sizes, state)
    if cu_seqlens is not None and return_state:
        raise reject(op, "return_state", "False with packed sequences", return_state)
    call = Call(q, k, v, block, count, scale, key_mask)
    form = choose(op, FORMS, impl, call)
    with without_autocast(q):
        if cu_seqlens is not None:
            return _packed(op, call, form.run, cu_seqlens, sizes)
        if state is None and not return_state:
            return form.run(call)
        if key_mask is not None:
            real = key_mask[:, None, :, None]
            k, v = (x.masked_fill(~real, 0.0) for x in (k, v))
        cache = KVCache.extend(op, state, k, v, key_mask=key_mask)
        run = Call(q, cache.k, cache.v, block, count, scale, cache.key_mask, cache)
        out = form.run(run)
    return (out, cache) if return_state else out


def _packed(op: str, call: Call, run: Any, cu_seqlens: Tensor, sizes: Sizes) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Tensor:
        return run(Call(q, k, v, call.block, call.count, call.scale, operands["key_mask"]))

    sequences = spans(op, cu_seqlens, None, sizes)
    masks = {"key_mask": (call.key_mask, 1)}
    return run_packed(one, sequences, call.q, call.k, call.v, {}, masks)


def check_choice_of_blocks(
    op: str, sizes: Sizes, q: Tensor, block: Any, count: Any, causal: Any, scale: Any,
    key_mask: Any,
) -> None:  # fmt: skip
    """Metadata of what the functions of this folder share."""
    check_integer(op, "block", block)
    check_integer(op, "count", count)
    check_flag(op, "causal", causal)
    if not causal:
        raise reject(op, "causal", "True: a query's own block is its last", causal)
    check_scale(op, scale, sizes, q)
    check_key_mask(op, key_mask, sizes, q)
