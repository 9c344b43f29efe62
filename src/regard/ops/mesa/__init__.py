"""Mesa attention: at every token the best ridge regression of all values on all keys so far."""

from __future__ import annotations

from typing import Any, Literal

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
    check_number,
    check_per_head,
    check_qkv,
    reject,
)
from regard.core.dispatch import choose
from regard.core.packed import check_packed, run_packed, spans
from regard.core.precision import cast_for_autocast
from regard.core.state import FixedState
from regard.ops.linear.states import check_fixed
from regard.ops.mesa.forms import FORMS, Call

__all__ = ["mesa_attention"]

_OP = "mesa_attention"
_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-3,
    torch.float16: 4.5e-4,
}


def mesa_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    log_decay: Float[Tensor, "b hk s"] | None = None,
    beta: Float[Tensor, "b hk s"] | None = None,
    ridge: float | Float[Tensor, ""] | Float[Tensor, " h"] | Float[Tensor, "h d"] = 1.0,
    causal: bool = False,
    solver: Literal["auto", "direct", "cg"] = "auto",
    tol: float | None = None,
    max_iters: int | None = None,
    chunk_size: int | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    compat: Literal["official"] | None = None,
    impl: str = "auto",
) -> Any:
    """Mesa attention (MesaNet): the ridge regression of values on keys, applied to the query.

        Hkk_t = exp(a_t) Hkk_{t-1} + beta_t k_t k_t^T,
        Hkv_t = exp(a_t) Hkv_{t-1} + beta_t k_t v_t^T,    o_t = Hkv_t^T (Hkk_t + R)^-1 q_t

    with a_t = `log_decay` and R = diag(`ridge`): o_t = W q_t, where W minimises
    sum_j w_tj beta_j |v_j - W k_j|^2 + tr(W R W^T) and w_tj is the decay from j to t. R does not
    decay, so it weighs more where the evidence is old. With `causal` a query reads the sums up
    to its own key; without, those of all keys: then one factorisation serves all queries. There
    is no scale; the authors normalise q and k to length 1 before the call.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        log_decay: [B, 1 | Hk, S], at most 0. Minus infinity (and any step below -1000, whose
            exponential is 0 in float64 too) forgets exactly. None: nothing is forgotten.
        beta: [B, 1 | Hk, S], at least 0: the weight of a pair. None: 1.
        ridge: above 0: a number or a tensor [], one per head [H], or one per head and channel
            [H, D].
        solver: "direct" builds and factorises Hkk_t for every token, "cg" applies it in
            conjugate gradients; "auto" is "direct" up to D = 32 and without `causal`.
        tol: relative residual at which a query's conjugate gradients stop. None: 1e-12 for
            float64, 1e-4 for float32, 4.5e-4 for float16 and 3e-3 for bfloat16 inputs, whose
            rounding then does most of the error; the backward uses a tenth of it. With 0 every
            query makes `max_iters` iterations and nothing is synchronised.
        max_iters: iterations at most. None: 2 D + 8.
        chunk_size: tokens per chunk; changes results by rounding only.
        key_mask: bool [B, S], True = real key. A masked key writes nothing and advances no
            decay; what it holds reaches no value and no gradient.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host.
        state: what an earlier call returned: its tokens come before these. key_mask, beta and
            log_decay describe the new keys.
        return_state: also return the state, `{"Hkk": [B, Hk, D, D], "Hkv": [B, Hk, D, Dv]}`.
        compat: "official" makes the authors' iteration instead: `max_iters` steps (30 by
            default) for every query, with 1e-5 added to both denominators, from Jacobi's guess
            when one token continues a state. It stalls at relative errors of 3e-4 to 1e-3.
        impl: "auto", "triton", "eager" or "reference". "triton" is causal conjugate gradients on
            a GPU, up to 128 channels: the forward in three kernels, the second solve of the
            backward in one, with the sums around it those of "eager". "auto" takes it where it
            was verified.

    Precision: sums, states and solves in float32 (float64 for float64 inputs); sums of log_decay
    in float64. On unit keys with ridge 0.25, float32 is within 5e-7 of float64 with the direct
    solver, 1e-4 with conjugate gradients and 1e-6 with tol=1e-6; a ridge of 1e-3 costs a factor
    of 50. "triton" multiplies bfloat16 in its own precision, but for sums of keys and the first
    D / 16 steps, in two terms, other inputs by three products of TF32, and adds in float32. Rows
    are solved on their own: no result depends on its neighbours.
    Cost: per token O(D^3 + C D^2) with the direct solver, O(C D + D^2) per iteration of
    conjugate gradients in chunks of C, and O(T (D + Dv)) memory in both, the backward pass
    included: it makes a second solve, which the exact gradient needs, and recomputes the sums.
    Source: von Oswald et al. 2025, "MesaNet: Sequence Modeling by Locally Optimal Test-Time
    Training", arXiv 2506.05233. The authors' exact operator, its states and six gradients are
    matched to 1e-5 in float32, their 2, 5 and 30 guarded iterations to 1e-4.
    Limits: differentiable once. A state keeps no past: a causal call that continues one may have
    at most one query more than new keys. A query whose sums overflow gives 0.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> k = torch.randn(1, 1, 50, 3, dtype=torch.float64)
    >>> v = k @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    >>> q = torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]], dtype=torch.float64)
    >>> mesa_attention(q, k, v, ridge=1e-9).flatten().round(decimals=6).tolist()
    [1.0, -2.0]
    """
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(_OP, q, k, v)
    for name, flag in (("causal", causal), ("return_state", return_state)):
        check_flag(_OP, name, flag)
    check_key_mask(_OP, key_mask, sizes, q)
    per_key = (sizes.B, (1, sizes.Hk), sizes.S)
    check_float_operand(_OP, "log_decay", log_decay, per_key, q)
    check_float_operand(_OP, "beta", beta, per_key, q)
    _check_ridge(ridge, sizes, q)
    _check_solver(solver, tol, max_iters, chunk_size, causal, compat)
    shapes = {
        "Hkk": (sizes.B, sizes.Hk, sizes.D, sizes.D),
        "Hkv": (sizes.B, sizes.Hk, sizes.D, sizes.Dv),
    }
    check_fixed(_OP, "mesa", state, shapes, sizes, q, causal)
    check_packed(_OP, cu_seqlens, cu_seqlens_k, sizes, state)
    if cu_seqlens is not None and return_state:
        raise reject(_OP, "return_state", "False with packed sequences", return_state)
    settings = {
        "solver": None if solver == "auto" else solver,
        "tol": tol, "max_iters": max_iters, "chunk_size": chunk_size,
    }  # fmt: skip
    given = tuple(name for name, value in settings.items() if value is not None)
    call = Call(
        q, k, v, causal, log_decay, beta, ridge, solver,
        _TOLERANCE[q.dtype] if tol is None else tol,
        max_iters, chunk_size, key_mask, state, return_state, compat, given,
    )  # fmt: skip
    form = choose(_OP, FORMS, impl, call)
    if cu_seqlens is None:
        return form.run(call)

    def one(q: Tensor, k: Tensor, v: Tensor, **operands: Tensor | None) -> Tensor:
        piece = call.one(q, k, v, **operands)
        return choose(_OP, FORMS, impl, piece).run(piece)

    sequences = spans(_OP, cu_seqlens, cu_seqlens_k, sizes)
    operands: dict[str, tuple[Tensor | None, int]]
    operands = {"key_mask": (key_mask, 1), "log_decay": (log_decay, 2), "beta": (beta, 2)}
    return run_packed(one, sequences, q, k, v, {}, operands)


def _check_ridge(ridge: Any, sizes: Sizes, q: Tensor) -> None:
    if not isinstance(ridge, Tensor):
        check_number(_OP, "ridge", ridge, above=0.0)
    elif ridge.dim() == 2:
        check_float_operand(_OP, "ridge", ridge, (sizes.H, sizes.D), q)
    else:
        check_per_head(_OP, "ridge", ridge, sizes, q)


def _check_solver(
    solver: Any, tol: Any, max_iters: Any, chunk_size: Any, causal: bool, compat: Any
) -> None:
    check_choice(_OP, "solver", solver, ("auto", "direct", "cg"))
    for name, count in (("max_iters", max_iters), ("chunk_size", chunk_size)):
        if count is not None:
            check_integer(_OP, name, count)
    if tol is not None:
        check_number(_OP, "tol", tol, least=0.0)
    if compat is None:
        return
    check_choice(_OP, "compat", compat, ("official",))
    if not causal:
        raise reject(_OP, "compat", "None without causal: the authors have no such form", compat)
    if solver == "direct":
        raise reject(_OP, "solver", "'auto' or 'cg' with compat='official'", solver)
    if tol is not None:
        raise reject(_OP, "tol", "None with compat='official', which tests no convergence", tol)
