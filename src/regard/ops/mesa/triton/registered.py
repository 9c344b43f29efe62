"""`regard::mesa_triton_fwd`, and `regard::mesa_triton_solve`, the second solve of its gradient.

Importing this needs no Triton and no GPU. The gradient is the implicit one of `registered.py`
beside this folder: the solve in it is a kernel, the two sums around it are the eager
`regard::linear_bwd`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.ops.linear.chunked import default_chunk
from regard.ops.mesa.registered import of_ridge

_SUMS = "Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? past_keys"
_OPERANDS = f"Tensor q, {_SUMS}, Tensor? past_values, Tensor ridge"


def _where(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: that of the operands, then."""
    if x.device.type != "cuda" or x.device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(x.device)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    past_keys: Tensor | None, past_values: Tensor | None, ridge: Tensor, tol: float,
    tol_backward: float, limit: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out, x, both sums after all keys, steps of each tile."""
    from regard.ops.mesa.triton import launch

    with _where(q):
        return launch.forward(q, k, v, beta, log_decay, past_keys, past_values, ridge, tol, limit)


def run_solve(
    right: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, past_keys: Tensor | None,
    ridge: Tensor, tol: float, limit: int,
) -> Tensor:  # fmt: skip
    """(Hkk_t + R)^-1 right."""
    from regard.ops.mesa.triton import launch

    with _where(right):
        return launch.solve(right, k, beta, log_decay, past_keys, ridge, tol, limit)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    past_keys: Tensor | None, past_values: Tensor | None, ridge: Tensor, tol: float,
    tol_backward: float, limit: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, H, T, D = q.shape
    steps = q.new_empty(B, H, -(-T // 64), dtype=torch.int32)
    x = q.new_empty(B, H, T, D, dtype=torch.float32)
    sums = [x.new_empty(B, k.shape[1], D, width) for width in (D, v.shape[3])]
    return q.new_empty(B, H, T, v.shape[3]), x, *sums, steps


def _fake_solve(
    right: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, past_keys: Tensor | None,
    ridge: Tensor, tol: float, limit: int,
) -> Tensor:  # fmt: skip
    return right.new_empty(right.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, *tensors, _, ctx.tol, ctx.limit = inputs
    ctx.kind = q.dtype
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1], output[4])


def _differentiate(
    ctx: Any, d_out: Tensor, _: Any, d_keys_sum: Tensor, d_values_sum: Tensor, __: Any
) -> tuple[Any, ...]:
    x, k, v, beta, log_decay, past_keys, past_values, ridge = ctx.saved_tensors
    chunk, wanted = default_chunk(k), ctx.needs_input_grad[4]
    key, value, strength = k.float(), v.float(), beta.float()
    started = past_keys is not None
    if past_keys is None or past_values is None:
        past_keys, past_values = torch.zeros_like(d_keys_sum), torch.zeros_like(d_values_sum)
    weighted = strength[..., None] * key
    linear = torch.ops.regard.linear_bwd
    dx, d_weighted, dv, d_decay, d_past_values = linear(
        d_out.float(), d_values_sum, x, weighted, value, log_decay, past_values, chunk, wanted
    )
    s = _solve(dx, k, beta, log_decay, past_keys, ridge, ctx.tol, ctx.limit)
    _none, dk, more, more_decay, d_past_keys = linear(
        -s, d_keys_sum.mT, x, key, weighted, log_decay, past_keys.mT, chunk, wanted
    )
    d_weighted = d_weighted + more
    dk = dk + strength[..., None] * d_weighted
    d_beta = (d_weighted * key).sum(-1)
    if wanted:
        d_decay = (d_decay + more_decay).to(log_decay.dtype)
    return (
        s.to(ctx.kind), dk.to(k.dtype), dv.to(v.dtype), d_beta.to(beta.dtype),
        d_decay if wanted else None, d_past_keys.mT if started else None,
        d_past_values if started else None, of_ridge(s, x, ridge), None, None, None,
    )  # fmt: skip


def _solve_batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    (x,), (axis,) = batched(lambda *folded: (_solve(*folded),))(info, in_dims, *args)
    return x, axis


_solve = define(
    "mesa_triton_solve",
    "(Tensor right, Tensor k, Tensor beta, Tensor? log_decay, Tensor? past_keys, Tensor ridge, "
    "float tol, int limit) -> Tensor",
    run_solve,
    _fake_solve,
    vmap=_solve_batched,
)
mesa = define(
    "mesa_triton_fwd",
    f"({_OPERANDS}, float tol, float tol_backward, int limit) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    run_forward,
    _fake_forward,
    backward=_differentiate,
    setup_context=_save,
    vmap=batched(lambda *given: mesa(*given)),
)
