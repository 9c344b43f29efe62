"""The division by the sum of weights, which the engine brings as the last column of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.library import define


def mean(sums: Tensor, minimum: float | None = None, epsilon: float = 0.0) -> Tensor:
    """sums [..., E + 1] -> [..., E]: weighted sums over the sum of weights; 0 without weight.

    With a `minimum` above 0 the divisor is that much at least (and no gradient reaches the sum
    of weights where it is less); with an `epsilon`, the divisor is the sum plus that. A row that
    no loss looks at has no gradient, even where it has overflowed: through a plain division, 0
    times its infinity would reach all keys before it.
    """
    return _forward(sums, minimum, epsilon)[0]


def _divide(
    sums: Tensor, minimum: float | None = None, epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    weight = sums[..., -1:] + epsilon if epsilon else sums[..., -1:]
    if minimum is not None:
        weight = weight.clamp(min=minimum)
    weight = weight.masked_fill(weight == 0, 1.0)
    return sums[..., :-1] / weight, weight


def _divide_gradient(
    gradient: Tensor, out: Tensor, weight: Tensor, minimum: float | None = None
) -> Tensor:
    result = _fake_gradient(gradient, out, weight)
    shares = torch.div(gradient, weight, out=result[..., :-1])
    lost = (shares * out).masked_fill_(shares == 0, 0.0)
    torch.sum(lost, -1, keepdim=True, out=result[..., -1:]).neg_()
    if minimum is not None:
        result[..., -1:].masked_fill_(weight <= minimum, 0.0)
    return result


def _fake(
    sums: Tensor, minimum: float | None = None, epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    return sums.new_empty(*sums.shape[:-1], sums.shape[-1] - 1), sums.new_empty(*sums.shape[:-1], 1)


def _fake_gradient(
    gradient: Tensor, out: Tensor, weight: Tensor, minimum: float | None = None
) -> Tensor:
    return out.new_empty(*out.shape[:-1], out.shape[-1] + 1)


def _save_results(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)
    ctx.minimum = inputs[1]


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None]:
    return _backward(gradient, *ctx.saved_tensors, ctx.minimum), None, None


def _map_forward(
    info: Any, in_dims: tuple[Any, ...], sums: Tensor, minimum: Any = None, epsilon: float = 0.0
) -> Any:
    return _forward(sums.movedim(in_dims[0], 0), minimum, epsilon), (0, 0)


def _map_backward(
    info: Any,
    in_dims: tuple[Any, ...],
    gradient: Tensor,
    out: Tensor,
    weight: Tensor,
    minimum: float | None = None,
) -> tuple[Tensor, int]:
    moved = [
        x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
        for x, axis in zip((gradient, out, weight), in_dims[:3], strict=True)
    ]
    return _backward(*moved, minimum), 0


_backward = define(
    "linear_mean_bwd",
    "(Tensor gradient, Tensor out, Tensor weight, float? minimum=None) -> Tensor",
    _divide_gradient,
    _fake_gradient,
    vmap=_map_backward,
)
_forward = define(
    "linear_mean_fwd",
    "(Tensor sums, float? minimum=None, float epsilon=0.0) -> (Tensor, Tensor)",
    _divide,
    _fake,
    backward=_differentiate,
    setup_context=_save_results,
    vmap=_map_forward,
)
