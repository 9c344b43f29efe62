"""Parallax: softmax attention corrected by a learned probe of the covariance of keys and values."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.precision import cast_for_autocast
from regard.ops.local_linear.forms import Call, attend, check
from regard.ops.parallax.forms import FORMS, OP

__all__ = ["parallax_attention"]


def parallax_attention(
    q: Float[Tensor, "b h t d"],
    r: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    cu_seqlens_k: Int[Tensor, " sequences+1"] | None = None,
    block_size: int | None = None,
    state: KVCache | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Local linear attention whose probe is a projection r of the query's token, not a solve.

    With scores s_ij = scale q_i . k_j (plus key_bias and decay) and p = softmax(s_i) over the
    keys that query i sees,

        kbar = sum_j p_j k_j,    o_i = sum_j p_j (1 - r_i . (k_j - kbar)) v_j,

    which is softmax attention less Cov_p(v, k) r. r = 0 is softmax attention; r = the solution g
    of (C + lambda I) g = kbar - q is local linear attention. The weights sum to 1 for every r,
    and may be negative. The scale multiplies q . k only.

    Arguments:
        q: queries [B, H, T, D].
        r: probes [B, H, T, D], of any floating dtype.
        k, v: keys [B, Hk, S, D] and values [B, Hk, S, Dv]; H is a multiple of Hk.
        causal: query i sees keys j <= i + S - T: aligned at the end, so that the last query
            sees all keys (torch's attention aligns at the start). With more queries than keys
            the first rows see nothing.
        scale: None is D ** -0.5; a number or a tensor [], or one per head [H], differentiable.
        key_mask: True = real key. Masked keys count for nothing, whatever they contain.
        key_bias: added to the scores of a key.
        log_decay: <= 0; key j is seen by query i with the extra score
            sum_{l=j+1..i} log_decay_l; -inf forgets everything before. Without `causal`
            every query stands at the last key.
        window: (left, right) keys seen beside the query's own position; -1 is unbounded. The
            authors' window of W keys is (W - 1, 0).
        cu_seqlens, cu_seqlens_k: boundaries of packed sequences, int32 with B = 1.
        block_size: queries per tile; changes results by rounding only.
        state, return_state: continue from (whichever op it comes from), and return, a
            `KVCache`; operands of the call describe its new keys only. r is not kept.
        impl: "native" (plain C on CPUs, not for float64 inputs; refuses block_size), "eager"
            (blockwise, everything), "reference" (dense, differentiable twice; refuses
            block_size), or "triton" (a GPU, heads of up to 128 channels, no float64 and no
            block_size). "auto" takes triton on devices where it was verified
            (`regard.gpu.VERIFIED`: an H100), native on CPUs, else eager.

    Returns:
        Output [B, H, T, Dv] in q's dtype; rows that see no key are 0. With return_state
        (out, state).

    Precision:
        Computes in float32 for 16-bit inputs, in float64 for float64. Keys are centred first:
        an offset common to all keys, which the formula of the release cancels badly, costs
        nothing (2e-7 instead of 2e-5 in float32 at offset 100).

    Cost:
        O(T S D): three products of size T x S x D where softmax attention has two. Memory
        O((T + S) D): the weights of one block of queries are held, no T x S tensor. The
        backward recomputes them.

    Source:
        Zuo et al., "Parallax: Parameterized Local Linear Attention for Language Modeling",
        arXiv 2605.29157 (2026), in a centred form that is equal to the paper's. Matches the
        authors' reference (flash-linear-attention), outputs and gradients, to 1e-5 in float32.

    Limits:
        Nothing bounds r: large probes make large weights of both signs. The authors normalise
        r per head as they do q and k; so does a model, before it calls this.
        Differentiable once (impl="reference": any number of times); torch.vmap works,
        torch.func.grad does not.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or domain.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 6, 8)
    >>> plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> out = parallax_attention(q, torch.zeros_like(q), k, v, causal=True)
    >>> torch.allclose(out, plain, atol=1e-6)
    True
    """
    q, r, k, v = cast_for_autocast(q, r, k, v)
    sizes = checks.check_qkv(OP, q, k, v)
    if not isinstance(r, Tensor):
        raise checks.reject(OP, "r", "a torch.Tensor", r, kind=TypeError)
    checks.check_float_operand(OP, "r", r, (sizes.B, sizes.H, sizes.T, sizes.D), q)
    checks.check_flag(OP, "return_state", return_state)
    if block_size is not None:
        checks.check_integer(OP, "block_size", block_size)
    checks.check_state(OP, state, KVCache)
    call = Call(
        q, k, v, causal, 1.0, "relative", scale, key_mask, key_bias, log_decay, window,
        tol=0.0, tol_backward=0.0, solver="cg", block_size=block_size or 0,
        stateful=state is not None or return_state, probe=r,
    )
    check(OP, sizes, call)
    (out, *_), after = attend(
        OP, FORMS, call, sizes, cu_seqlens, cu_seqlens_k, state, return_state, impl
    )
    return (out, after) if return_state else out
