"""Lightning attention: linear attention with a decay, no feature map and no normaliser.

`slopes.py` has the decays of published models, `left_product.py` the first version of the
algorithm, `bidirectional.py` an extension to both directions.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import reject
from regard.core.state import FixedState
from regard.ops.lightning.bidirectional import bidirectional_lightning_attention
from regard.ops.lightning.forms import FIRST, OP, SECOND
from regard.ops.lightning.heads import heads_of_decay
from regard.ops.lightning.slopes import (
    alibi_slopes,
    constant_log_decay,
    fla_log_decay,
    tnl_layer_slopes,
)
from regard.ops.linear.attend import attend
from regard.ops.linear.problem import Problem

__all__ = [
    "alibi_slopes",
    "bidirectional_lightning_attention",
    "constant_log_decay",
    "fla_log_decay",
    "lightning_attention",
    "tnl_layer_slopes",
]


def lightning_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    log_decay: Float[Tensor, "b hk s"] | Float[Tensor, "b h s"] | None = None,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    version: Literal[1, 2] = 2,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Lightning attention: causal linear attention that forgets, in one pass of constant speed.

        S_t = exp(a_t) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t
            = scale sum_{j <= t} w_tj (q_t . k_j) v_j,    w_tj = exp(a_{j+1} + ... + a_t)

    with a_t = `log_decay`. There is no softmax, no feature map and no normaliser: published
    models normalise the output, as values grow with the memory that the decay leaves. In the
    paper a_t is one constant per head, -s_h: `constant_log_decay(-alibi_slopes(H), k)`, or
    `tnl_layer_slopes`, or `fla_log_decay`.

    The paper's call is causal self-attention with a constant decay. Ours beyond it: decays of
    every token, cross-attention, and without `causal`, where every query reads the state after
    the last key (`bidirectional_lightning_attention` decays to both sides instead).

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        log_decay: [B, 1 | Hk, S], at most 0; None is 0. Where the query heads of one key head
            differ in their decay, [B, H, S]: keys and values are then repeated, and the state
            has H heads. Minus infinity (and any step below -1000, whose exponential is 0 in
            float64 too) forgets exactly. It has a gradient, unlike in the authors' kernels.
        scale: multiplies q: a number or a tensor [], or one per head [H]. None is 1, as in the
            paper; flash-linear-attention's is D ** -0.5.
        key_mask: bool [B, S], True = real key. A masked key writes nothing and advances no
            decay; what it holds reaches no value and no gradient.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host. States
            then have one row per sequence.
        version: 2, chunks with a state between them (Lightning Attention-2); or 1, the left
            product in tiles (Lightning Attention-1): quadratic time, no state inside, causal.
        chunk_size: tokens per chunk, or tile; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these. key_mask and
            log_decay describe the new keys.
        return_state: also return the state, `{"S": [B, Hk, D, Dv]}`.
        impl: "auto", "eager" or "reference", or "native" or "triton" where `regard.explain`
            says that it can serve.

    Precision: sums and states in float32 (float64 for float64 inputs); sums of log_decay in
    float64, and no power of a decay is formed, so none overflows.
    Cost: O((T + S) D Dv) time, plus O(T C (D + Dv)) in chunks of C; O(T (D + Dv)) memory, the
    backward pass included, which recomputes the states. Version 1: O(T^2 (D + Dv)) time.
    Source: Qin et al. 2024, "Various Lengths, Constant Speed: Efficient Language Modeling with
    Lightning Attention", arXiv 2405.17381, and "Lightning Attention-2", arXiv 2401.04658;
    version 1 after arXiv 2307.14995. The authors' kernels, outputs and gradients, are matched to
    3e-5 and 1e-4 in float32, flash-linear-attention with its packed states to 5e-5 and 2e-4.
    Limits: differentiable once. A state keeps no past: a causal call that continues one may have
    at most one query more than new keys.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.ones(1, 2, 3, 1), torch.ones(1, 2, 3, 1), torch.ones(1, 2, 3, 1)
    >>> half = constant_log_decay(torch.tensor([0.5, 1.0]).log(), k)  # head 1 never forgets
    >>> lightning_attention(q, k, v, causal=True, log_decay=half)[0, :, :, 0]
    tensor([[1.0000, 1.5000, 1.7500],
            [1.0000, 2.0000, 3.0000]])
    """
    if isinstance(version, bool) or version not in (1, 2):
        raise reject(OP, "version", "1 or 2", version)
    if version == 1 and causal is False:
        raise reject(OP, "version", "2 without causal", version)
    k, v = heads_of_decay(q, k, v, log_decay)
    problem = Problem(
        q, k, v, causal, scale=scale, key_mask=key_mask, log_decay=log_decay, chunk=chunk_size,
        cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    owner = SECOND if version == 2 else FIRST
    return attend(owner, problem, state=state, return_state=return_state, impl=impl)
