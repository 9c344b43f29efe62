"""The division by the sum of weights, which the engine brings as the last column of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.ops.linear.mapped import rowwise


def mean(sums: Tensor) -> Tensor:
    """sums [..., E + 1] -> [..., E]: weighted sums over the sum of weights; 0 without weight.

    A row that no loss looks at has no gradient, even where it has overflowed: through a plain
    division, 0 times its infinity would reach all keys before it.
    """
    return _forward(sums)[0]


def _divide(sums: Tensor) -> tuple[Tensor, Tensor]:
    weight = sums[..., -1:]
    weight = weight.masked_fill(weight == 0, 1.0)
    return sums[..., :-1] / weight, weight


def _divide_gradient(gradient: Tensor, out: Tensor, weight: Tensor) -> Tensor:
    result = _fake_gradient(gradient, out, weight)
    shares = torch.div(gradient, weight, out=result[..., :-1])
    lost = (shares * out).masked_fill_(shares == 0, 0.0)
    torch.sum(lost, -1, keepdim=True, out=result[..., -1:]).neg_()
    return result


def _fake(sums: Tensor) -> tuple[Tensor, Tensor]:
    return sums.new_empty(*sums.shape[:-1], sums.shape[-1] - 1), sums.new_empty(*sums.shape[:-1], 1)


def _fake_gradient(gradient: Tensor, out: Tensor, weight: Tensor) -> Tensor:
    return out.new_empty(*out.shape[:-1], out.shape[-1] + 1)


def _save_results(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> Tensor:
    return _backward(gradient, *ctx.saved_tensors)


_backward = define(
    "linear_mean_bwd",
    "(Tensor gradient, Tensor out, Tensor weight) -> Tensor",
    _divide_gradient,
    _fake_gradient,
    vmap=rowwise(lambda *tensors: _backward(*tensors)),
)
_forward = define(
    "linear_mean_fwd",
    "(Tensor sums) -> (Tensor, Tensor)",
    _divide,
    _fake,
    backward=_differentiate,
    setup_context=_save_results,
    vmap=rowwise(lambda sums: _forward(sums)),
)
