"""`regard::linear_delta_triton_fwd` and `regard::linear_delta_triton_bwd`.

Importing this needs no Triton and no GPU: kernels are loaded by the first call that runs one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? state, float scale, "
    "bool unit"
)


def _where(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: that of the operands, then."""
    if x.device.type != "cuda" or x.device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(x.device)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None,
    scale: float, unit: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, E] and the last state."""
    from regard.ops.linear.triton_delta import launch

    with _where(q):
        return launch.forward(q, k, v, beta, log_decay, state, scale, unit)


def run_backward(
    d_out: Tensor, d_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    log_decay: Tensor | None, state: Tensor | None, scale: float, unit: bool, wants_decay: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the tensors in their order; that of log_decay of no element if not wanted."""
    from regard.ops.linear.triton_delta import launch

    with _where(q):
        return launch.backward(
            d_out, d_state, q, k, v, beta, log_decay, state, scale, unit, wants_decay
        )


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None,
    scale: float, unit: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    last = q.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), last


def _fake_backward(
    d_out: Tensor, d_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    log_decay: Tensor | None, state: Tensor | None, scale: float, unit: bool, wants_decay: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = tuple(log_decay.shape) if wants_decay and log_decay is not None else (0,)
    like = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    return *like, d_state.new_empty(shape), d_state.new_empty(d_state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.unit = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing allows no more
    log_decay, wanted = saved[4], ctx.needs_input_grad[4]
    *others, d_decay, d_past = _bwd(d_out, d_state, *saved, ctx.scale, ctx.unit, wanted)
    d_decay = d_decay.to(log_decay.dtype) if wanted else None
    return *others, d_decay, d_past if ctx.needs_input_grad[5] else None, None, None


_bwd = define(
    "linear_delta_triton_bwd",
    f"(Tensor d_out, Tensor d_state, {_OPERANDS}, bool wants_decay) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run_backward,
    _fake_backward,
    vmap=batched(lambda *given: _bwd(*given)),
)
delta = define(
    "linear_delta_triton_fwd",
    f"({_OPERANDS}) -> (Tensor, Tensor)",
    run_forward,
    _fake_forward,
    backward=_differentiate,
    setup_context=_save,
    vmap=batched(lambda *given: delta(*given)),
)
