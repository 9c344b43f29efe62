"""`regard::mesa_solve_fwd` and `regard::mesa_read_fwd`: ridge systems, with implicit gradients.

With x = (Hkk + R)^-1 q and a gradient dx of it, s = (Hkk + R)^-1 dx is a second solve, and

    dq = s,    dR = -s o x,    dHkk = -s x^T.

The last one is that of linear attention with the queries x, the outputs' gradient -s and the
values beta k, so its backward gives the gradients of keys, decays and the state before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.core.precision import without_autocast
from regard.ops.linear.chunks import Chunks, through, to_end
from regard.ops.mesa.systems import Solver, solve_rows, solve_shared


def _solver(q: Tensor, method: str, tol: float, limit: int) -> Solver:
    return Solver(method, tol, limit or 2 * q.shape[3] + 8)


def _ridge(ridge: Tensor, heads: int) -> Tensor:
    """[B, Hk | H, D] as [N, 1 | G, 1, D]."""
    B, own, D = ridge.shape
    return ridge.reshape(B * heads, own // heads, 1, D)


def _solve(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    past: Tensor,
    ridge: Tensor,
    chunk: int,
    method: str,
    tol: float,
    tol_backward: float,
    limit: int,
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        chunks, (B, H, T, D), Hk = Chunks(q, k, k, log_decay, chunk), q.shape, k.shape[1]
        weighted = chunks.k * beta.reshape(chunks.N, T, 1)
        penalty, solver = _ridge(ridge, Hk), _solver(q, method, tol, limit)
        x = q.new_empty(chunks.N, chunks.G, T, D)
        matrix = past.reshape(chunks.N, D, D).clone()
        for i, j in chunks.spans():
            run, rows = chunks.run(i, j), chunks.rows(chunks.q, i, j)
            keys, heavy = chunks.k[:, i:j], weighted[:, i:j]
            found = solve_rows(chunks, rows, keys, heavy, matrix, penalty, run, solver)
            x[:, :, i:j] = found.view(chunks.N, chunks.G, j - i, D)
            matrix = torch.baddbmm(through(matrix, run), to_end(heavy, run).mT, keys)
        return x.view(B, H, T, D), matrix.view(past.shape)


def _read(
    q: Tensor,
    past: Tensor,
    ridge: Tensor,
    method: str,
    tol: float,
    tol_backward: float,
    limit: int,
) -> Tensor:
    with without_autocast(q):
        (B, H, T, D), Hk = q.shape, past.shape[1]
        rows, matrix = q.reshape(B * Hk, H // Hk, T, D), past.reshape(B * Hk, D, D)
        x = solve_shared(rows, matrix, _ridge(ridge, Hk), _solver(q, method, tol, limit))
        return x.reshape(q.shape).clone(memory_format=torch.contiguous_format)


def of_ridge(s: Tensor, x: Tensor, ridge: Tensor) -> Tensor:
    """The gradient of the ridge [B, Hk | H, D], from both solves."""
    B, heads, D = ridge.shape
    return -(s * x).sum(2).view(B, heads, x.shape[1] // heads, D).sum(2)


def _save_solve(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *tensors, ctx.chunk, ctx.method, _, ctx.tol, ctx.limit = inputs
    ctx.save_for_backward(output[0], *tensors)


def _differentiate_solve(ctx: Any, dx: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    x, k, beta, log_decay, past, ridge = ctx.saved_tensors
    method = "official" if ctx.method == "official_step" else ctx.method
    options = (ctx.chunk, method, ctx.tol, ctx.tol, ctx.limit)
    s = _solve_op(dx, k, beta, log_decay, past, ridge, *options)[0]
    wanted = ctx.needs_input_grad[3]
    weighted = beta[..., None] * k
    _, dk, d_weighted, d_decay, d_past = torch.ops.regard.linear_bwd(
        -s, d_state.mT, x, k, weighted, log_decay, past.mT, ctx.chunk, wanted
    )
    dk = dk + beta[..., None] * d_weighted
    d_beta = (d_weighted * k).sum(-1)
    d_decay = d_decay.to(log_decay.dtype) if wanted else None
    gradients = s, dk, d_beta, d_decay, d_past.mT, of_ridge(s, x, ridge)
    return *gradients, None, None, None, None, None


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, past, ridge, ctx.method, _, ctx.tol, ctx.limit = inputs
    ctx.save_for_backward(output, past, ridge)


def _differentiate_read(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
    x, past, ridge = ctx.saved_tensors
    s = _read_op(dx, past, ridge, ctx.method, ctx.tol, ctx.tol, ctx.limit)
    (B, H, T, D), Hk = x.shape, past.shape[1]
    d_past = -(s.reshape(B, Hk, H // Hk * T, D).mT @ x.reshape(B, Hk, H // Hk * T, D))
    return s, d_past, of_ridge(s, x, ridge), None, None, None, None


def _fake_solve(q, k, beta, log_decay, past, ridge, chunk, method, tol, tol_backward, limit):
    return q.new_empty(q.shape), past.new_empty(past.shape)


def _fake_read(q, past, ridge, method, tol, tol_backward, limit):
    return q.new_empty(q.shape)


def _read_batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    (x,), (axis,) = batched(lambda *folded: (_read_op(*folded),))(info, in_dims, *args)
    return x, axis


_OPTIONS = "str method, float tol, float tol_backward, int limit"
_solve_op = define(
    "mesa_solve_fwd",
    "(Tensor q, Tensor k, Tensor beta, Tensor? log_decay, Tensor past, Tensor ridge, int chunk, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _solve,
    _fake_solve,
    backward=_differentiate_solve,
    setup_context=_save_solve,
    vmap=batched(lambda *args: _solve_op(*args)),
)
_read_op = define(
    "mesa_read_fwd",
    f"(Tensor q, Tensor past, Tensor ridge, {_OPTIONS}) -> Tensor",
    _read,
    _fake_read,
    backward=_differentiate_read,
    setup_context=_save_read,
    vmap=_read_batched,
)
solve, read = _solve_op, _read_op
