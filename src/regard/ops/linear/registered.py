"""A chunked recurrence as a pair of torch operators, `regard::<name>_fwd` and `_bwd`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.ops.linear.chunks import decay_shape


def register(
    name: str,
    operands: Sequence[str],
    attend: Callable[..., tuple[Tensor, Tensor]],
    differentiate: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward operator (q, k, v, *operands, log_decay, state, chunk) -> (out, state).

    `attend` is it, `differentiate` its backward: (d_out, d_state, those arguments, wants_decay)
    -> gradients of the tensors in their order, that of log_decay of no element where it is not
    wanted. `operands` names what lies between v and log_decay.
    """
    needed = ", ".join(f"Tensor {operand}" for operand in ("q", "k", "v", *operands))
    arguments = f"{needed}, Tensor? log_decay, Tensor state, int chunk"
    gradients = ", ".join(["Tensor"] * (5 + len(operands)))

    def fake_forward(*given: Any) -> tuple[Tensor, Tensor]:
        q, v, state = given[0], given[2], given[-2]
        return q.new_empty(*q.shape[:3], v.shape[3]), _like(state)

    def fake_backward(d_out: Tensor, d_state: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *tensors, log_decay, state, _, wants_decay = given
        d_decay = tensors[0].new_empty(decay_shape(log_decay, wants_decay))
        return *map(_like, tensors), d_decay, _like(state)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.chunk = inputs
        ctx.save_for_backward(*tensors)

    def backward_of_forward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Any, ...]:
        log_decay, wanted = ctx.saved_tensors[-2], ctx.needs_input_grad[-3]
        found = backward(d_out, d_state, *ctx.saved_tensors, ctx.chunk, wanted)
        *others, d_decay, d_past = found
        return *others, d_decay.to(log_decay.dtype) if wanted else None, d_past, None

    backward = define(
        f"{name}_bwd",
        f"(Tensor d_out, Tensor d_state, {arguments}, bool wants_decay) -> ({gradients})",
        differentiate,
        fake_backward,
        vmap=batched(lambda *given: backward(*given)),
    )
    forward = define(
        f"{name}_fwd",
        f"({arguments}) -> (Tensor, Tensor)",
        attend,
        fake_forward,
        backward=backward_of_forward,
        setup_context=save,
        vmap=batched(lambda *given: forward(*given)),
    )
    return forward


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
