"""The Triton form as a pair of torch operators, `regard::linear_triton_fwd` and `_bwd`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.gpu import interpreting
from regard.ops.linear.triton.learned import mapped, unmapped
from regard.ops.linear.triton.shapes import Options, of_backward, of_forward, room

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? key_mask, Tensor? S, Tensor? z"
_MAPS = "Tensor? map_q, Tensor? map_k"
_OPTIONS = (
    "bool causal, str query_map, str key_map, float scale, bool normalised, float minimum, "
    "float epsilon, bool wants_state"
)


def _where(q: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: that of the operands, then."""
    if q.device.type != "cuda" or q.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(q.device)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, key_mask: Tensor | None,
    S: Tensor | None, z: Tensor | None, map_q: Tensor | None, map_k: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    from regard.ops.linear.triton import launch

    with _where(q):
        return launch.forward(q, k, v, log_decay, key_mask, S, z, Options(*options), (map_q, map_k))


def _run_backward(
    grad: Tensor, grad_S: Tensor, grad_z: Tensor, out: Tensor, bottoms: Tensor, starts: Tensor,
    start_totals: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    key_mask: Tensor | None, S: Tensor | None, z: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    from regard.ops.linear.triton import gradient

    *options, of_decay, of_first = rest
    kept = gradient.Kept(q, k, v, log_decay, key_mask, S, z, out, bottoms, starts, start_totals)
    with _where(q):
        return tuple(
            gradient.backward(grad, grad_S, grad_z, kept, Options(*options), of_decay, of_first)
        )


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    decays = rest[0] is not None
    return tuple(room(of_forward(q, v, Options(*rest[6:]), decays, interpreting()), q))


def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    q, k, v, log_decay = given[7:11]
    *options, of_decay, of_first = given[14:]
    of_decay = of_decay and log_decay is not None
    return tuple(room(of_backward(q, k, v, Options(*options), of_decay, of_first), q))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, _, bottoms, starts, start_totals = output
    ctx.mark_non_differentiable(bottoms, starts, start_totals)
    ctx.options = inputs[9:]
    # The output itself is of use to the gradient of a normaliser only.
    kept = out if ctx.options[4] else bottoms
    ctx.save_for_backward(*inputs[:9], kept, bottoms, starts, start_totals)


def _differentiate(ctx: Any, grad: Tensor, grad_S: Tensor, grad_z: Tensor, *_: Any) -> Any:
    *tensors, map_q, map_k, out, bottoms, starts, start_totals = ctx.saved_tensors
    of_decay = ctx.needs_input_grad[3]
    of_first = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
    q, k, _, log_decay, mask, S, z = tensors
    found = linear_triton_bwd(
        grad, grad_S, grad_z, out, bottoms, starts, start_totals, mapped(q, map_q),
        mapped(k, map_k), *tensors[2:], *ctx.options, of_decay, of_first,
    )  # fmt: skip
    dq, dk, dv, d_decay, d_first, d_first_total = found
    dq, d_map_q = unmapped(dq, q, map_q, ctx.needs_input_grad[7])
    dk, d_map_k = unmapped(dk, k, map_k, ctx.needs_input_grad[8], mask)
    return (
        dq, dk, dv, d_decay.to(log_decay.dtype) if of_decay else None, None,
        d_first if of_first and S is not None else None,
        d_first_total if of_first and z is not None else None,
        d_map_q, d_map_k, *(None,) * len(ctx.options),
    )  # fmt: skip


linear_triton_bwd = define(
    "linear_triton_bwd",
    "(Tensor grad, Tensor grad_S, Tensor grad_z, Tensor out, Tensor bottoms, Tensor starts, "
    f"Tensor start_totals, {_TENSORS}, {_OPTIONS}, bool of_decay, bool of_first) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    vmap=batched(lambda *given: linear_triton_bwd(*given)),
)
linear_triton_fwd = define(
    "linear_triton_fwd",
    f"({_TENSORS}, {_MAPS}, {_OPTIONS}) -> (Tensor out, Tensor S, Tensor z, Tensor bottoms, "
    "Tensor starts, Tensor start_totals)",
    _run_forward,
    _fake_forward,
    backward=_differentiate,
    setup_context=_save,
    vmap=batched(lambda *given: linear_triton_fwd(*given)),
)
