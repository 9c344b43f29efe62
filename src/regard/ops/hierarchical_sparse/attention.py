"""Attention of blocks of queries to lists of tokens, with dense rows at the end."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.accumulate import rows_by
from regard.core.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_qkv,
    check_scale,
    check_shape,
    reject,
)
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.ops.block_sparse import block_sparse_attention, selected_attention
from regard.ops.hierarchical_sparse.selection import tokens_back

OP = "token_sparse_attention"


def token_sparse_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    indices: Int[Tensor, "#b #h n m"],
    *,
    block: int,
    instruction: int = 0,
    window: tuple[int, int] | None = None,
    causal: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    impl: str = "auto",
    compat: str | None = None,
) -> Float[Tensor, "b h t dv"]:
    """Each block of queries attends to the tokens of its list; the last queries to all.

        o_i = sum_j softmax_j(scale q_i . k_j) v_j,   j in indices[i // block], j <= i,
        and for the last `instruction` queries over all j <= i

    Args:
        q, k, v: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv]; H a multiple of Hk.
        indices: integers [1 or B, 1 | Hk | H, ceil((T - instruction) / block), m]: tokens, -1 for
            none. A token named twice counts once.
        block: queries that share a list.
        instruction: queries at the end that attend densely.
        window: (left, right), tokens before its own position that a query sees (with `causal`).
        causal: query i stands at key i + S - T.
        scale: None is D ** -0.5.
        impl: of the sparse part, "auto", "eager" or "reference".
        compat: "official": a token that a list names n times weighs n times.

    Precision: float32 inside (float64 for float64 inputs).
    Cost: O(T m (D + Dv)), and O(instruction S (D + Dv)).
    Source: DHSA, arXiv 2510.24606, 2025; outputs matched to 2e-5 for the authors' lists.
    Limits: differentiable once. No key mask: it is for prompts.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 64, 8)
    >>> near = torch.arange(4)[:, None] * 16 + torch.arange(-16, 16)
    >>> token_sparse_attention(q, k, v, near.clamp(min=-1)[None, None], block=16).shape
    torch.Size([1, 2, 64, 8])
    """
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(OP, q, k, v)
    T, S = sizes.T, sizes.S
    check_integer(OP, "block", block)
    check_integer(OP, "instruction", instruction, least=0)
    check_flag(OP, "causal", causal)
    check_scale(OP, scale, sizes, q)
    left = tokens_back(OP, window, causal)
    if compat is not None:
        check_choice(OP, "compat", compat, ("official",))
        if impl not in ("auto", "eager"):
            raise reject(OP, "compat", "None with another form than the eager one", compat)
    instruction = min(instruction, T)
    blocked = T - instruction
    _check_indices(indices, q, k, -(-blocked // block))
    given: dict[str, Any] = {"causal": causal, "scale": scale}
    given["window"] = None if left is None else (left, -1)
    sparse = q[:, :, :blocked]
    # Without the keys of the dense queries, the end of the keys is the end of the blocks.
    near = max(S - instruction, 0) if causal else S
    with without_autocast(q):
        if compat is None:
            indices = torch.where(indices < near, indices.long(), -1)
            out = selected_attention(
                sparse, k[:, :, :near], v[:, :, :near], indices, block=1, block_q=block, impl=impl,
                **given,
            )  # fmt: skip
        else:
            out = _repeated(sparse, k, v, indices.long(), block, left, causal, scale, S - T)
        if not instruction:
            return out
        everything = q.new_ones(1, 1, -(-instruction // 64), -(-S // 128), dtype=torch.bool)
        rows = block_sparse_attention(
            q[:, :, blocked:], k, v, everything, block_q=64, block_k=128, **given
        )
        return torch.cat([out, rows], 2)


def _repeated(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block: int, left: int | None,
    causal: bool, scale: float | Tensor | None, offset: int,
) -> Tensor:  # fmt: skip
    """Every entry of a list is a key of its own."""
    (B, H, T, D), dtype = q.shape, compute_dtype(q.dtype)
    factor: float | Tensor = D**-0.5
    if scale is not None:
        factor = scale.to(dtype).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    indices = indices.repeat_interleave(H // indices.shape[1], 1).expand(B, -1, -1, -1)
    outputs = [q.new_zeros(B, H, 0, v.shape[3])]
    for i, t in enumerate(range(0, T, block)):
        chosen = indices[:, :, i]
        rows = (q[:, :, t : t + block].to(dtype)) * factor
        keys, values = (rows_by(x, chosen.clamp(min=0)).to(dtype) for x in (k, v))
        place = torch.arange(t, min(t + block, T), device=q.device)[:, None] + offset
        hidden = chosen[:, :, None] < 0
        if causal:
            hidden = hidden | (chosen[:, :, None] > place)
        if left is not None:
            hidden = hidden | (chosen[:, :, None] < place - left)
        weights = (rows @ keys.mT).masked_fill(hidden, -torch.inf).softmax(3)
        weights = torch.where(hidden.all(3, keepdim=True), 0.0, weights)
        outputs.append((weights @ values).to(q.dtype))
    return torch.cat(outputs, 2)


def _check_indices(indices: Any, q: Tensor, k: Tensor, rows: int) -> None:
    integers = (torch.int32, torch.int64)
    if not isinstance(indices, Tensor) or indices.dtype not in integers:
        raise reject(OP, "indices", "a tensor of int32 or int64", indices, kind=TypeError)
    m = indices.shape[-1] if indices.dim() else 1
    heads = (1, k.shape[1], q.shape[1])
    check_shape(OP, "indices", indices, ((1, len(q)), heads, rows, m), q)
