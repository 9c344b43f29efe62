"""Local linear attention: a local affine fit around every query, instead of a local average."""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.precision import cast_for_autocast
from regard.ops.local_linear import forms
from regard.ops.local_linear.analysis import local_linear_slope, local_linear_weights
from regard.ops.local_linear.forms import LocalLinearAux

__all__ = [
    "LocalLinearAux",
    "local_linear_attention",
    "local_linear_slope",
    "local_linear_weights",
]


def local_linear_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    ridge: float | Float[Tensor, " h"] | Float[Tensor, "b heads t"] = 1.0,
    ridge_mode: Literal["relative", "absolute"] = "relative",
    scale: float | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    cu_seqlens_k: Int[Tensor, " sequences+1"] | None = None,
    tol: float | None = None,
    tol_backward: float | None = None,
    max_iters: int | None = None,
    block_size: int | None = None,
    state: KVCache | None = None,
    return_state: bool = False,
    return_aux: bool = False,
    impl: str = "auto",
) -> Any:
    """Attention as local regression: fits v ~ b + W (k - q) around each query and returns b.

    With scores s_ij = scale q_i . k_j (plus key_bias and decay) and p = softmax(s_i) over the
    keys that query i sees,

        kbar = sum_j p_j k_j,    C = sum_j p_j (k_j - kbar)(k_j - kbar)^T,
        g = (C + lambda I)^-1 (kbar - q_i),
        o_i = sum_j p_j (1 - g . (k_j - kbar)) v_j.

    Softmax attention is the local average (g = 0, or lambda to infinity); here the trend of the
    values around the query is taken into account. The signed weights p_j (1 - ...) sum to 1, so
    constant values are returned exactly, and values that are affine in the keys nearly so.

    Arguments:
        q: queries [B, H, T, D].
        k, v: keys [B, Hk, S, D] and values [B, Hk, S, Dv]; H is a multiple of Hk.
        causal: query i sees keys j <= i + S - T: aligned at the end, so that the last query
            sees all keys (torch's attention aligns at the start). With more queries than keys
            the first rows see nothing.
        ridge: lambda > 0: a number, one per head [H], or one per query token
            [B, 1 | Hk | H, T]. Tensors of any floating dtype; differentiable.
        ridge_mode: "relative": lambda is added to the covariance of the normalised weights.
            "absolute": to that of the weights exp(s), so that it counts less where there is
            more evidence: lambda_i = lambda exp(-lse_i).
        scale: None is D ** -0.5; a number or one per head [H], differentiable.
        key_mask: True = real key. Masked keys count for nothing, whatever they contain.
        key_bias: added to the scores of a key.
        log_decay: <= 0; key j is seen by query i with the extra score
            sum_{l=j+1..i} log_decay_l; -inf forgets everything before. Without `causal`
            every query stands at the last key.
        window: (left, right) keys seen beside the query's own position; -1 is unbounded.
        cu_seqlens, cu_seqlens_k: boundaries of packed sequences, int32 with B = 1.
        tol: relative residual at which a query's solve stops. None: 1e-12 for float64, 1e-4
            for float32, 1e-2 for bfloat16 and float16 inputs. With 0 every query makes
            `max_iters` iterations and nothing is synchronised.
        tol_backward: the same for the solves of the backward. None: tol / 100.
        max_iters: iterations at most. None: 2 D + 8.
        block_size: queries per tile; changes results by rounding only.
        state, return_state: continue from, and return, a `KVCache`; operands of the call
            describe its new keys only.
        return_aux: also return a `LocalLinearAux`.
        impl: "eager" (blockwise, the default) or "reference" (dense, differentiable twice).

    Returns:
        Output [B, H, T, Dv] in q's dtype; rows that see no key are 0. With return_state and
        return_aux: (out, state), (out, aux) or (out, state, aux).

    Precision:
        Computes in float32 for 16-bit inputs, in float64 for float64. At the default tolerance
        float32 outputs are within about 5e-5 of float64; with tol=1e-6 within about 1e-6 on
        well-conditioned keys. Keys are centred first, so a common offset of the keys costs
        nothing; keys of large norm with a small ridge do (1e-3 at worst, norm 10, ridge 0.1).
        Each row is solved on its own: results do not depend on the rest of the batch.

    Cost:
        Two products of size T x S x D per iteration, about 5 iterations at ridge 10, 8 at 1
        and D / 4 at 0.1. Memory O((T + S) D): the weights of one block of queries are held,
        no T x S tensor. The backward recomputes them, refines g and makes a second solve: about
        twice the forward.

    Source:
        Zuo et al., "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
        Attention For Test-Time Regression", arXiv 2510.01450, in a centred form that is equal
        to the paper's. Matches the authors' fp32 operator to 1e-9 when that runs in float64.
        Gradients are exact to tol_backward; the authors' backward holds the normaliser of the
        ridge constant and differs by about 10%.

    Limits:
        Differentiable once (impl="reference": any number of times); torch.vmap works,
        torch.func.grad does not. Aux carries no gradients.
        An absolute ridge vanishes as exp(-lse): with sharp scores (lse above 10 or so) the fit
        is singular to float32's precision and its outputs are noise: use float64. A query
        whose solve breaks down, or that is more than 1e19 away from its keys in float32, gets
        the local average; `aux.residual` of 1 shows it.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or domain.

    >>> import torch
    >>> k = torch.linspace(-1, 1, 9, dtype=torch.float64)[None, None, :, None]
    >>> q = torch.tensor([1.5], dtype=torch.float64)[None, None, :, None]
    >>> out = local_linear_attention(q, k, 3 * k + 2, ridge=1e-6)  # beyond the last key
    >>> round(out.item(), 3)
    6.5
    """
    q, k, v = cast_for_autocast(q, k, v)
    op = forms.OP
    sizes = checks.check_qkv(op, q, k, v)
    for name, flag in (("return_state", return_state), ("return_aux", return_aux)):
        checks.check_flag(op, name, flag)
    for name, count in (("max_iters", max_iters), ("block_size", block_size)):
        if count is not None:
            checks.check_integer(op, name, count)
    for name, value in (("tol", tol), ("tol_backward", tol_backward)):
        if value is not None:
            checks.check_number(op, name, value, least=0.0)
    checks.check_state(op, state, KVCache)
    tolerance = forms.TOLERANCE[q.dtype] if tol is None else tol
    call = forms.Call(
        q, k, v, causal, ridge, ridge_mode, scale, key_mask, key_bias, log_decay, window,
        tolerance, forms.backward_tolerance(tolerance) if tol_backward is None else tol_backward,
        max_iters or 0, block_size or 0, state is not None or return_state,
    )
    forms.check(op, sizes, call)
    answer, after = forms.attend(call, sizes, cu_seqlens, cu_seqlens_k, state, return_state, impl)
    out, *aux = answer
    results: list[Any] = [out]
    if return_state:
        results.append(after)
    if return_aux:
        results.append(LocalLinearAux(*(x.detach() for x in aux)))
    return results[0] if len(results) == 1 else tuple(results)
