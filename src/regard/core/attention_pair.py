"""Attention as a pair of torch operators, forward and backward, from two plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched


def attention_pair(
    name: str,
    arguments: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    *,
    gradients: int = 3,
) -> Callable[..., Any]:
    """Registers `regard::<name>_fwd` and `_bwd` and returns the former, differentiable once.

    `arguments` is the schema of what goes in: q, k, v, other tensors, then settings, which are
    no tensors. The first `gradients` of the tensors have a gradient.

        forward(q, k, v, *rest) -> out [..., Dv], lse [...]     for q [..., D]
        backward(d_out, out, lse, q, k, v, *rest) -> one gradient for each of these tensors

    of the shape of the tensor, or [0] where an optional one is not given. `lse`, the log-sum-exp
    of a query's scores, is what a backward computes the weights from; it has no gradient itself.
    `vmap` folds the mapped axis into the first one of every tensor.
    """
    tensors = arguments.count("Tensor")

    def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])

    def fake_backward(d_out: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
        shapes = [(0,) if x is None else x.shape for x in given[:gradients]]
        return tuple(d_out.new_empty(shape) for shape in shapes)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.settings = inputs[tensors:]

    def differentiate(ctx: Any, d_out: Tensor, _: Any) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        found = gradient(d_out, out, lse, *inputs, *ctx.settings)
        wanted = [None if x is None else d for x, d in zip(inputs, found, strict=False)]
        return *wanted, *(None for _ in (*inputs[gradients:], *ctx.settings))

    gradient = define(
        f"{name}_bwd",
        f"(Tensor d_out, Tensor out, Tensor lse, {arguments}) -> "
        f"({', '.join(['Tensor'] * gradients)})",
        backward,
        fake_backward,
        vmap=batched(lambda *given: gradient(*given)),
    )
    attention = define(
        f"{name}_fwd",
        f"({arguments}) -> (Tensor, Tensor)",
        forward,
        fake_forward,
        backward=differentiate,
        setup_context=save,
        vmap=batched(lambda *given: attention(*given)),
    )
    return attention
