"""From the public arguments to a form: checks, the cache, packed sequences, which form runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.checks import Sizes, words
from regard.core.decay import DecaySums, decay_sums
from regard.core.dispatch import Form, choose
from regard.core.packed import check_packed, spans
from regard.core.precision import compute_dtype
from regard.ops.local_linear.kernel import as_dot
from regard.ops.local_linear.reference import equations
from regard.ops.local_linear.registered import local_linear_fwd
from regard.ops.local_linear.solve import prefers_direct

OP = "local_linear_attention"
RIDGE_MODES = ("relative", "absolute")
SOLVERS = ("auto", "direct", "cg")
KERNELS = ("dot", "gaussian")
GRADIENTS = ("exact", "official")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 3e-4}


class LocalLinearAux(NamedTuple):
    """What a call can tell beside its output; none of it carries gradients.

    Fields:
        lse: log of the sum of exp(score) over the keys each query sees [B, H, T].
        slope: g = (C + lambda I)^-1 (kbar - q) [B, H, T, D]; the weights are
            p_j (1 - g . (k_j - kbar)).
        iterations: of the solver, for each query (int32 [B, H, T]).
        residual: the relative residual at which it stopped [B, H, T].
    """

    lse: Tensor
    slope: Tensor
    iterations: Tensor
    residual: Tensor


def backward_tolerance(tol: float) -> float:
    """What the backward solves to, unless told otherwise: tol / 100.

    Gradients of ridge, scale and decay are small sums of large terms. With tol / 10 their error
    was measured to be 30 times that of the output, with tol / 100 at most 7 times. Below 1e-13
    nothing is gained even in float64.
    """
    return min(tol, max(tol / 100, 1e-13))


@dataclass(frozen=True)
class Call:
    """One call, checked; without `decay` and `past` before a form is chosen."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    ridge: float | Tensor
    ridge_mode: str
    scale: float | Tensor | None
    key_mask: Tensor | None
    key_bias: Tensor | None
    log_decay: Tensor | None
    window: tuple[int, int] | None
    tol: float
    tol_backward: float
    solver: str = "auto"
    kernel: str = "dot"
    intercept: bool = True
    covariance_block: int | None = None
    grad: str = "exact"
    max_iters: int = 0  # 0: 2 D + 8
    block_size: int = 0  # 0: by the sizes
    stateful: bool = False
    decay: DecaySums | None = None
    row_bias: Tensor | None = None  # beside the scores, of the Gaussian kernel
    probe: Tensor | None = None  # g where it is given, as in Parallax
    given: tuple[str, ...] = ()  # the options of the blockwise form that the caller set


Answer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # out, lse, slope, iterations, residual


def operands(call: Call) -> tuple[Any, ...]:
    """The tensors of the registered op."""
    q, dtype, decay = call.q, compute_dtype(call.q.dtype), call.decay
    if decay is None and call.log_decay is not None:
        decay = decay_sums(call.log_decay, call.key_mask)
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)[None]
    else:
        scale = torch.full((1, 1), float(scale), dtype=dtype, device=q.device)
    sums, first = decay if decay is not None else (None, None)
    ridge = _ridge(call, dtype)
    return (
        q, call.k, call.v, ridge, scale, call.key_mask, call.key_bias, sums, first,
        call.row_bias, call.probe,
    )


def takes_direct(call: Call) -> bool:
    """Whether the solve is direct: under "auto" by metadata and the number that a ridge is."""
    if call.covariance_block is not None:
        return True
    if call.solver != "auto":
        return call.solver == "direct"
    ridge = 1.0 if isinstance(call.ridge, Tensor) else float(call.ridge)
    _, H, T, D = call.q.shape
    sizes = (T * (H // call.k.shape[1]), call.k.shape[2], D)
    return prefers_direct(call.q.dtype, sizes, ridge, call.ridge_mode == "absolute")


def options(call: Call) -> tuple[Any, ...]:
    """The options of the registered op."""
    left, right = call.window if call.window is not None else (-1, -1)
    return (
        call.causal, left, right, call.ridge_mode == "absolute", call.intercept,
        call.grad == "official", call.covariance_block or 0, takes_direct(call),
        call.tol, call.tol_backward, call.max_iters, call.block_size,
    )


def run_eager(call: Call) -> Answer:
    """The blockwise form: a Gaussian kernel becomes a dot product with biases first."""
    dot = as_dot(call) if call.kernel == "gaussian" else call
    # The options are those of the call: float32 copies of 16-bit inputs do not change the solver.
    out, slope, lse, iterations, residual = local_linear_fwd(*operands(dot), *options(call))
    return out.to(call.q.dtype), lse, slope, iterations, residual


def _ridge(call: Call, dtype: torch.dtype) -> Tensor:
    """The ridge as [B | 1, H | 1, T | 1]."""
    ridge, heads = call.ridge, call.q.shape[1]
    if not isinstance(ridge, Tensor):
        return torch.full((1, 1, 1), float(ridge), dtype=dtype, device=call.q.device)
    ridge = ridge.to(dtype)
    if ridge.dim() < 2:
        return ridge.reshape(1, -1, 1)
    if ridge.shape[1] not in (1, heads):
        ridge = ridge.repeat_interleave(heads // ridge.shape[1], 1)
    return ridge


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
