"""From the public arguments to a form: checks, the cache, packed sequences, which form runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.checks import Sizes, words
from regard.core.dispatch import Form, choose
from regard.core.packed import check_packed, spans
from regard.ops.local_linear import native, triton
from regard.ops.local_linear.call import (
    GRADIENTS,
    KERNELS,
    OP,
    PRECISIONS,
    RIDGE_MODES,
    SOLVERS,
    TOLERANCE,
    Answer,
    Call,
    LocalLinearAux,
    backward_tolerance,
    operands,
    options,
    run,
    takes_direct,
)
from regard.ops.local_linear.reference import equations
from regard.ops.local_linear.registered import local_linear_fwd

__all__ = [
    "OP", "TOLERANCE", "Answer", "Call", "LocalLinearAux", "backward_tolerance", "operands",
    "options", "run_eager", "takes_direct",
]  # fmt: skip


def run_eager(call: Call) -> Answer:
    """The blockwise form."""
    return run(local_linear_fwd, call)


def _reference(call: Call) -> Answer:
    out, lse, slope = equations(
        call.q, call.k, call.v, call.causal, call.ridge, call.ridge_mode, call.scale,
        call.key_mask, call.key_bias, call.log_decay, call.window, call.kernel, call.intercept,
        call.covariance_block,
    )
    return out, lse, slope, torch.zeros_like(lse, dtype=torch.int32), torch.zeros_like(lse)


def _reference_refuses(call: Call) -> str | None:
    if call.grad == "official":
        return "its gradient is exact"
    if call.given:
        return f"it has no blocks and no iterations, nothing to do with {', '.join(call.given)}"
    return "it keeps no state" if call.stateful else None


FORMS = (
    *triton.FORMS,
    Form("native", "native", native.refuse, native.serve),
    Form("eager", "blockwise", lambda call: None, run_eager),
    Form("reference", "reference", _reference_refuses, _reference, auto=False),
)


def check(op: str, sizes: Sizes, call: Call) -> None:
    """Everything about the mathematical arguments of a call that metadata can tell."""
    q = call.q
    B, H, Hk, S = sizes.B, sizes.H, sizes.Hk, sizes.S
    checks.check_flag(op, "causal", call.causal)
    checks.check_choice(op, "ridge_mode", call.ridge_mode, RIDGE_MODES)
    if not isinstance(call.ridge, Tensor):
        checks.check_number(op, "ridge", call.ridge, above=0.0)
    else:
        _check_ridge(op, sizes, call.ridge, q)
    checks.check_choice(op, "solver", call.solver, SOLVERS)
    checks.check_choice(op, "kernel", call.kernel, KERNELS)
    checks.check_choice(op, "grad", call.grad, GRADIENTS)
    checks.check_choice(op, "precision", call.precision, PRECISIONS)
    checks.check_flag(op, "intercept", call.intercept)
    _check_blocks(op, sizes.D, call)
    checks.check_scale(op, call.scale, sizes, q)
    checks.check_key_mask(op, call.key_mask, sizes, q)
    checks.check_float_operand(op, "key_bias", call.key_bias, (B, (1, Hk, H), S), q)
    checks.check_float_operand(op, "log_decay", call.log_decay, (B, (1, Hk, H), S), q)
    checks.check_window(op, call.window)


def _check_ridge(op: str, sizes: Sizes, ridge: Tensor, like: Tensor) -> None:
    """One for all, one per head, or one per query token."""
    B, H, Hk, T = sizes.B, sizes.H, sizes.Hk, sizes.T
    heads = tuple(dict.fromkeys((1, Hk, H)))
    shape = {0: (), 1: (H,)}.get(ridge.dim(), (B, heads, T))
    shapes = [(), (H,), *((B, n, T) for n in heads)]
    if ridge.is_floating_point() and tuple(ridge.shape) not in shapes:
        per_token = f"[{B}, {' or '.join(map(str, heads))}, {T}]"
        raise checks.reject(op, "ridge", f"of shape [], [{H}] or {per_token}", ridge)
    checks.check_float_operand(op, "ridge", ridge, shape, like)


def _check_blocks(op: str, D: int, call: Call) -> None:
    """Block-diagonal covariances: what they fit, and what they are not defined with."""
    block = call.covariance_block
    if block is None:
        return
    checks.check_integer(op, "covariance_block", block)
    if D % block:
        raise checks.reject(op, "covariance_block", f"a divisor of the head size {D}", block)
    for name, accepted, fits in (
        ("solver", "'auto' or 'direct'", call.solver != "cg"),
        ("intercept", "True", call.intercept),
        ("grad", "'exact'", call.grad == "exact"),
    ):
        if not fits:
            raise checks.reject(op, name, f"{accepted} with covariance_block", getattr(call, name))


def attend(
    op: str,
    forms: Sequence[Form],
    call: Call,
    sizes: Sizes,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    state: KVCache | None,
    return_state: bool,
    impl: str,
) -> tuple[Answer, KVCache | None]:
    """The answer of a checked call, and the state after it."""
    check_packed(op, cu_seqlens, cu_seqlens_k, sizes, state)
    if cu_seqlens is not None and return_state:
        raise checks.reject(op, "return_state", "False with packed sequences", words("True"))
    form = choose(op, forms, impl, call)
    if cu_seqlens is not None:
        return _packed(op, form, call, sizes, cu_seqlens, cu_seqlens_k), None
    if not call.stateful:
        return form.run(call), None
    cache = KVCache.extend(
        op, state, call.k, call.v,
        key_mask=call.key_mask, key_bias=call.key_bias, log_decay=call.log_decay,
    )
    continued = replace(
        call, k=cache.k, v=cache.v, key_mask=cache.key_mask, key_bias=cache.key_bias,
        log_decay=None, decay=cache.decay,
    )
    return form.run(continued), cache if return_state else None


def _packed(
    op: str,
    form: Form,
    call: Call,
    sizes: Sizes,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
) -> Answer:
    """Each sequence on its own, laid end to end again."""

    def cut(x: Any, axis: int, start: int, stop: int) -> Any:
        return x.narrow(axis, start, stop - start) if isinstance(x, Tensor) else x

    answers = []
    for t0, t1, s0, s1 in spans(op, cu_seqlens, cu_seqlens_k, sizes):
        per_token = isinstance(call.ridge, Tensor) and call.ridge.dim() == 3
        one = replace(
            call,
            q=cut(call.q, 2, t0, t1),
            probe=cut(call.probe, 2, t0, t1),
            k=cut(call.k, 2, s0, s1),
            v=cut(call.v, 2, s0, s1),
            ridge=cut(call.ridge, 2, t0, t1) if per_token else call.ridge,
            key_mask=cut(call.key_mask, 1, s0, s1),
            key_bias=cut(call.key_bias, 2, s0, s1),
            log_decay=cut(call.log_decay, 2, s0, s1),
        )
        answers.append(form.run(one))
    if not answers:
        return form.run(call)
    out, lse, slope, iterations, residual = (torch.cat(x, 2) for x in zip(*answers, strict=True))
    return out, lse, slope, iterations, residual
