"""Dynamic hierarchical sparse attention: chunks of the prompt are scored, then tokens are taken.

- `selection.py`: scores of chunks, and the tokens that each block of queries gets
- `attention.py`: attention to lists of tokens
- `masks.py`: the later version, with blocks of keys instead of tokens
- `boundaries.py`: where chunks begin, and what a predictor of that learns from
- `reference.py`: the equations; `card.py`
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_qkv,
    check_scale,
    reject,
)
from regard.core.dispatch import Form, choose
from regard.core.precision import cast_for_autocast, without_autocast
from regard.ops.hierarchical_sparse.attention import token_sparse_attention
from regard.ops.hierarchical_sparse.masks import block_mask
from regard.ops.hierarchical_sparse.reference import hierarchical_sparse_attention_reference
from regard.ops.hierarchical_sparse.selection import (
    POOLINGS,
    check_boundaries,
    chunk_scores,
    fixed_chunks,
    select_tokens,
    tokens_back,
)

__all__ = [
    "block_mask",
    "chunk_scores",
    "fixed_chunks",
    "hierarchical_sparse_attention",
    "select_tokens",
    "token_sparse_attention",
]

OP = "hierarchical_sparse_attention"


def hierarchical_sparse_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    block: int = 128,
    budget: int = 1024,
    chunk: int = 64,
    boundaries: Int[Tensor, "#b m"] | None = None,
    local: int | None = None,
    global_: int = 0,
    window: tuple[int, int] | None = None,
    instruction: int = 0,
    normalise: bool = True,
    pooling: str = "mean",
    per_head: bool = False,
    causal: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    impl: str = "auto",
    compat: str | None = None,
) -> Float[Tensor, "b h t dv"]:
    """Each block of queries attends to a fixed number of tokens, from the chunks most like it.

        s_im = (mean query of block i) . (sum of the keys of chunk m) / sqrt(length of m)
        o_t = sum_j softmax_j(scale q_t . k_j) v_j,   j among the `budget` tokens of block i

    `chunk_scores`, `select_tokens` and `token_sparse_attention`, one after the other. For long
    prompts of trained models: nothing is learned, except boundaries if they are predicted.

    Args:
        q, k, v: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv]; H a multiple of Hk.
        block: queries that share a list of tokens.
        budget: tokens of a list; S or more is exact attention.
        chunk: tokens of a chunk, where `boundaries` does not say it.
        boundaries: [1 or B, M + 1], integers from 0 to S, not decreasing: chunks as they mean
            something (`boundaries.py`; `mixers.BoundaryPredictor` learns them).
        local: tokens up to the end of the query block that are always taken; None: `block`.
        global_: tokens at the beginning that are always taken.
        window: (left, right), with `causal`: a query sees `left` tokens before its own.
        instruction: queries at the end that attend to everything.
        normalise, pooling, per_head: as of `chunk_scores`.
        causal: query i stands at key i + S - T and sees what is there or before.
        scale: None is D ** -0.5.
        impl: "auto", "eager" or "reference" (with a T x S mask).
        compat: "official": windows as in `select_tokens`, and global tokens that a short list
            names several times weigh so often.

    Precision: scores, weights and sums in float32 (float64 for float64 inputs).
    Cost: O(T S D / (block chunk)) for the choice, O(T budget (D + Dv)) for the attention; memory
        O((T + S)(D + Dv)) and 16 MB.
    Source: Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for
        Memory-Constrained LLMs", 2025, arXiv 2510.24606, first version; outputs matched to 2e-5
        for the authors' lists of tokens.
    Limits: with `causal`, which keys a block attends to depends on all of its queries, and on
        all keys of a chunk: no later value is read, but the choice has seen it. It is for
        prompts, not for training. Differentiable once; the choice has no gradient.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 256, 16)
    >>> hierarchical_sparse_attention(q, k, v, block=32, budget=64, chunk=16, causal=True).shape
    torch.Size([1, 2, 256, 16])
    """
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(OP, q, k, v)
    for name, value in {"block": block, "budget": budget, "chunk": chunk}.items():
        check_integer(OP, name, value)
    for name, value in {"global_": global_, "instruction": instruction}.items():
        check_integer(OP, name, value, least=0)
    if local is not None:
        check_integer(OP, "local", local, least=0)
    for name, value in {"normalise": normalise, "per_head": per_head, "causal": causal}.items():
        check_flag(OP, name, value)
    check_choice(OP, "pooling", pooling, POOLINGS)
    check_scale(OP, scale, sizes, q)
    tokens_back(OP, window, causal)
    if boundaries is not None:
        check_boundaries(OP, boundaries, sizes.B, q)
    if compat is not None:
        check_choice(OP, "compat", compat, ("official",))
        if impl == "reference":
            raise reject(OP, "compat", "None with impl='reference'", compat)
    form = choose(OP, FORMS, impl, None)
    instruction = min(instruction, sizes.T)
    with without_autocast(q):
        if form.impl == "reference":
            return hierarchical_sparse_attention_reference(
                q, k, v, block=block, budget=budget, chunk=chunk, boundaries=boundaries,
                local=local, global_=global_, window=window, instruction=instruction,
                normalise=normalise, pooling=pooling, per_head=per_head, causal=causal,
                scale=scale,
            )  # fmt: skip
        with torch.no_grad():
            ends = fixed_chunks(sizes.S, chunk, q.device) if boundaries is None else boundaries
            scores = chunk_scores(
                q.detach(), k.detach(), ends, block=block, normalise=normalise, pooling=pooling,
                per_head=per_head, instruction=instruction,
            )  # fmt: skip
            indices = select_tokens(
                scores, ends, queries=sizes.T, keys=sizes.S, block=block, budget=budget,
                local=block if local is None else local, global_=global_, window=window,
                causal=causal, compat=compat,
            )  # fmt: skip
        return token_sparse_attention(
            q, k, v, indices, block=block, instruction=instruction, window=window, causal=causal,
            scale=scale, compat=compat,
        )  # fmt: skip


FORMS = (
    Form("eager", "lists", lambda call: None, lambda call: None),
    Form("reference", "reference", lambda call: None, lambda call: None, auto=False),
)
