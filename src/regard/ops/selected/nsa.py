"""Native sparse attention: the selected blocks, all blocks compressed, and a window, gated."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from regard.core.checks import check_float_operand, check_integer, check_qkv
from regard.core.dispatch import choose
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.ops.block_sparse import block_sparse_attention
from regard.ops.selected.forms import FORMS, Call
from regard.ops.selected.selection import block_means


def nsa_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    gate_selected: Float[Tensor, "b h t"] | None = None,
    gate_compressed: Float[Tensor, "b h t"] | None = None,
    gate_window: Float[Tensor, "b h t"] | None = None,
    block: int,
    count: int,
    window: int = 0,
    causal: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Attention to the most important blocks, to all blocks compressed and to a window, gated.

        o_i = g^s_i selected_i + g^c_i compressed_i + g^w_i window_i

    selected: `block_topk_attention`. compressed: softmax attention to the means of keys and
    values of the blocks that end at i or before (0 where none does). window: softmax attention
    to the last `window` tokens, the query's own included.

    Args:
        q, k, v: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv]; H a multiple of Hk.
        gate_selected, gate_compressed, gate_window: [B, H, T]; None is 1, except that a branch
            whose gate is not given is left out where another's is. All None: selected alone.
        block, count: as of `block_topk_attention`; the compressed blocks are the same.
        window: tokens; needed by `gate_window`, 0 without.
        causal: only True.
        scale: of all branches; None is D ** -0.5.
        impl: of the selected branch; "auto", "eager" or "reference".

    Precision: means, scores and sums in float32 (float64 for float64 inputs).
    Cost: that of `block_topk_attention`, O(T S (D + Dv) / block) and O(T window (D + Dv)).
    Source: the form that SSA (arXiv 2511.20102, 2025) compares itself with: choices exact, outputs
        matched to 2e-5. Native Sparse Attention itself (arXiv 2502.11089) compresses overlapping
        blocks by a learned network instead of their means.
    Limits: no masks and no states; differentiable once.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 64, 8)
    >>> gates = torch.rand(3, 1, 2, 64)
    >>> nsa_attention(
    ...     q, k, v, gate_selected=gates[0], gate_compressed=gates[1], gate_window=gates[2],
    ...     block=8, count=2, window=16,
    ... ).shape
    torch.Size([1, 2, 64, 8])
    """
    from regard.ops.selected import check_choice_of_blocks

    op = "nsa_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(op, q, k, v)
    check_choice_of_blocks(op, sizes, q, block, count, causal, scale, None)
    gates: dict[str, Any] = {
        "gate_selected": gate_selected,
        "gate_compressed": gate_compressed,
        "gate_window": gate_window,
    }
    for name, gate in gates.items():
        check_float_operand(op, name, gate, (sizes.B, sizes.H, sizes.T), q)
    check_integer(op, "window", window, least=0 if gate_window is None else 1)
    form = choose(op, FORMS, impl, Call(q, k, v, block, count, scale, None))
    with without_autocast(q):
        if all(gate is None for gate in gates.values()):
            return form.run(Call(q, k, v, block, count, scale, None))
        wide = compute_dtype(q.dtype)
        out = q.new_zeros(sizes.B, sizes.H, sizes.T, sizes.Dv, dtype=wide)
        if gate_selected is not None:
            part = form.run(Call(q, k, v, block, count, scale, None))
            out = out + gate_selected.to(wide)[..., None] * part
        if gate_compressed is not None:
            part = compressed_attention(q, k, v, block, scale)
            out = out + gate_compressed.to(wide)[..., None] * part
        if gate_window is not None:
            part = attention(q, k, v, scale, window=(window - 1, 0))
            out = out + gate_window.to(wide)[..., None] * part
        return out.to(q.dtype)


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, scale: float | Tensor | None
) -> Tensor:
    """Softmax attention to the means of complete blocks that end at the query or before.

    The `block` queries that see exactly the blocks before m stand side by side as heads: then it
    is ordinary attention, m strictly after its keys, and no mask of T x S / block is needed.
    """
    (H, T), S = q.shape[1:3], k.shape[2]
    means = [block_means(x, block).to(x.dtype) for x in (k, v)]
    start = max(0, S - T + 1)  # keys that the first query sees; the blocks it sees: start // block
    ahead = start % block  # empty queries that fill up its group
    lost = max(0, T - S)  # queries before the first key
    if lost:
        ahead, start, q = 1 % block, 1, q[:, :, lost:]
    n = q.shape[2]
    groups = -(-(ahead + n) // block)
    q = pad(q, (0, 0, ahead, groups * block - ahead - n))
    side = q.unflatten(2, (groups, block)).transpose(2, 3).flatten(1, 2)  # [B, H b, groups, D]
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale.repeat_interleave(block)
    blocks = (start - ahead) // block + groups - 1  # what the last group sees
    keys, values = (x[:, :, :blocks] for x in means)
    out = attention(side, keys, values, scale)
    out = out.unflatten(1, (H, block)).transpose(2, 3).flatten(2, 3)[:, :, ahead : ahead + n]
    return pad(out, (0, 0, lost, 0)) if lost else out


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor | None,
    window: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Causal softmax attention: a plan that leaves nothing out."""
    (H, T), (Hk, S) = q.shape[1:3], k.shape[1:3]
    block_q = max(1, min(128, 1024 // max(1, H // max(1, Hk))))
    levels = torch.ones(1, 1, -(-T // block_q), -(-S // 128), dtype=torch.bool, device=q.device)
    return block_sparse_attention(
        q, k, v, levels, block_q=block_q, block_k=128, causal=True, scale=scale, window=window
    )
