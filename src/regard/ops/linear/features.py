"""Feature maps phi: what linear attention puts in the place of exp(q . k).

The engine takes features, not queries and keys: a map of another width, or a learned one, is
applied before it and needs nothing from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import rowwise
from regard.ops.linear.problem import IDENTITY, Feature


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, of any size that the dtype holds; 0 stays 0.

    >>> unit(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    largest = x.detach().abs().amax(-1, keepdim=True)  # cancels, in value and gradient
    some = largest > 0
    x = x / torch.where(some, largest, 1.0)
    return x / torch.where(some, x.square().sum(-1, keepdim=True), 1.0).sqrt()


def elu(x: Tensor) -> Tensor:
    """phi(x) = 1 + elu(x), that is x + 1 above zero and exp(x) below: always positive.

    It keeps its result for the backward pass and nothing else: phi'(x) = min(phi(x), 1). It is
    written with exp, since 1 + (exp(x) - 1) would be exactly 0 in float32 from x = -17 on.
    """
    return _forward(x)


PIECE = 1 << 16  # numbers at once: what is made on the way stays in cache, and takes no memory


def _elu(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for y, part in _pieces(out, x):
        torch.clamp(part, max=0.0, out=y).exp_().add_(part.clamp(min=0.0))
    return out


def _elu_gradient(gradient: Tensor, features: Tensor) -> Tensor:
    if gradient.shape != features.shape:
        return gradient * features.clamp(max=1.0)
    out = torch.empty_like(features)
    for y, part, slope in _pieces(out, gradient, features):
        torch.clamp(slope, max=1.0, out=y).mul_(part)
    return out


def _pieces(out: Tensor, *given: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same elements of tensors of one shape, in the order of `out`, some at a time."""
    if out.device.type != "cpu" or out.numel() <= PIECE or not out.is_contiguous():
        return [(out, *given)]
    return zip(*(x.reshape(-1).split(PIECE) for x in (out, *given)), strict=True)


def _save_result(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, gradient: Tensor) -> Tensor:
    (features,) = ctx.saved_tensors
    return _backward(gradient, features)


_backward = define(
    "linear_elu_bwd",
    "(Tensor gradient, Tensor features) -> Tensor",
    _elu_gradient,
    lambda gradient, features: torch.empty_like(gradient * features),
    vmap=rowwise(lambda gradient, features: _backward(gradient, features)),
)
_forward = define(
    "linear_elu_fwd",
    "(Tensor x) -> Tensor",
    _elu,
    torch.empty_like,
    backward=_differentiate,
    setup_context=_save_result,
    vmap=rowwise(lambda x: _forward(x)),
)

ELU = Feature("elu", elu)
RELU = Feature("relu", torch.relu, keeps_zero=True)
UNIT = Feature("unit", unit, keeps_zero=True)
FEATURES = {"elu": ELU, "identity": IDENTITY}  # those that `linear_attention` offers by name
