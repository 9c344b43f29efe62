"""Feature maps that are learned: a linear map per head, z = x W + b, and an activation of z.

    softmax_dim    [softmax(z), softmax(-z)]                     each over its own channels
    exp_dim        [exp(z - max z), exp(min z - z)]
    exp            [exp(z), exp(-z)]                             |z| limited to 60
    joint_softmax  softmax([2 z, -2 z])                          over both halves together
    relu           max(z, 0)
    pos_elu        1 + elu(z)

Without `full_space` the second half of the first three is left out. All but exp and
joint_softmax are kept from falling below 1e-12. One operator, `regard::linear_activation_fwd`,
keeps its result for the backward pass and nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.core.checks import Sizes, check_choice, check_flag, check_float_operand, reject
from regard.core.library import define
from regard.core.mapped import rowwise
from regard.ops.linear.problem import Feature

ACTIVATIONS = ("softmax_dim", "exp_dim", "exp", "joint_softmax", "relu", "pos_elu")
TWO_SIDED = ("softmax_dim", "exp_dim", "exp")  # those that have a half to leave out
CLAMP = 1e-12
LIMIT = 60.0  # of an exponent: sums of e^60 v over any sequence stay below float32's largest


def width(activation: str, channels: int, full_space: bool = True) -> int:
    """Features of a map onto `channels` channels."""
    halves = activation == "joint_softmax" or (activation in TWO_SIDED and full_space)
    return 2 * channels if halves else channels


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None, skip: bool = False) -> Tensor:
    """z [B, h, n, F] = x W + b (+ x with `skip`) from x [B, h, n, D].

    weight [1 | h, D, F], None: the identity; bias [1 | h] or [1 | h, F].
    """
    z = x if weight is None else torch.matmul(x, weight.to(x.dtype))
    if bias is not None:
        z = z + bias.to(x.dtype).reshape(bias.shape[0], 1, -1)
    return z + x if skip and weight is not None else z


def activate(
    z: Tensor, activation: str, full_space: bool = True, *, shifted: bool = False
) -> Tensor:
    """phi [..., F or 2 F] from z [..., F].

    shifted: "exp" is divided by its largest feature, for queries, where that cancels.
    """
    return _forward(z, activation, full_space, shifted)


def _activate(z: Tensor, activation: str, full_space: bool, shifted: bool) -> Tensor:
    z = z.contiguous()  # so that the result is what `fake` says
    if activation == "relu":
        return z.clamp(min=CLAMP)
    if activation == "pos_elu":  # 1 + (exp(z) - 1) would lose all digits of a small result
        return z.clamp(max=0.0).exp_().add_(z.clamp(min=0.0)).clamp_(min=CLAMP)
    if activation == "joint_softmax":
        both = torch.cat([z, -z], -1).mul_(2.0)
        return torch.softmax(both, -1)
    F = z.shape[-1]
    out = z.new_empty(*z.shape[:-1], width(activation, F, full_space))
    halves = (out[..., :F], out[..., F:]) if full_space else (out,)
    if activation == "exp":
        z = z.clamp(-LIMIT, LIMIT)
        most = _largest(z, full_space) if shifted else None
    for half, sign in zip(halves, (1.0, -1.0), strict=False):
        if activation == "softmax_dim":
            half.copy_(torch.softmax(z if sign > 0 else -z, -1)).clamp_(min=CLAMP)
            continue
        if activation == "exp_dim":
            shift = z.amax(-1, keepdim=True) if sign > 0 else z.amin(-1, keepdim=True).neg_()
        else:
            shift = most
        torch.mul(z, sign, out=half)
        if shift is not None:
            half.sub_(shift)
        half.exp_()
        if activation == "exp_dim":
            half.clamp_(min=CLAMP)
    return out


def _largest(z: Tensor, full_space: bool) -> Tensor:
    return (z.abs() if full_space else z).amax(-1, keepdim=True)


def _differentiate_activation(
    gradient: Tensor, phi: Tensor, activation: str, full_space: bool, shifted: bool
) -> Tensor:
    gradient, phi = gradient.contiguous(), phi.contiguous()
    if activation == "relu":
        return gradient.masked_fill(phi <= CLAMP, 0.0)
    if activation == "pos_elu":
        return gradient.masked_fill(phi <= CLAMP, 0.0) * phi.clamp(max=1.0)
    if activation == "joint_softmax":
        inner = phi * (gradient - (gradient * phi).sum(-1, keepdim=True))
        one, other = inner.chunk(2, -1)
        return (one - other).mul_(2.0)
    if activation != "exp":
        gradient = gradient.masked_fill(phi <= CLAMP, 0.0)
    halves = 2 if full_space else 1
    weighed = gradient * phi
    if activation == "exp":
        if shifted:
            weighed = _through_the_largest(weighed, phi, 1.0)
        else:
            edge = torch.exp(phi.new_tensor(LIMIT))
            weighed.masked_fill_((phi >= edge) | (phi <= 1 / edge), 0.0)
        one, *other = weighed.chunk(halves, -1)
        return one - other[0] if other else one.contiguous()
    parts = []
    for part, p in zip(weighed.chunk(halves, -1), phi.chunk(halves, -1), strict=True):
        if activation == "softmax_dim":
            parts.append(part - p * part.sum(-1, keepdim=True))
        else:
            parts.append(_through_the_largest(part, p, 1.0))
    return parts[0] - parts[1] if full_space else parts[0]


def _through_the_largest(weighed: Tensor, phi: Tensor, largest: float) -> Tensor:
    """The gradient of the exponents where their largest was subtracted: shared by equals."""
    at = (phi == largest).to(phi.dtype)
    return weighed - at * (weighed.sum(-1, keepdim=True) / at.sum(-1, keepdim=True))


def fake(z: Tensor, activation: str, full_space: bool, shifted: bool) -> Tensor:
    """The shape of an activation's result, of whichever form computes it."""
    return z.new_empty(*z.shape[:-1], width(activation, z.shape[-1], full_space))


def fake_gradient(
    gradient: Tensor, phi: Tensor, activation: str, full_space: bool, shifted: bool
) -> Tensor:
    """The shape of z and of its gradient, from the result that was kept."""
    halves = phi.shape[-1] // width(activation, 1, full_space)
    return phi.new_empty(*phi.shape[:-1], halves)


def save_result(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the result for the backward pass: no activation needs its z again."""
    ctx.options = inputs[1:]
    ctx.save_for_backward(output)


def _of_forward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return _backward(gradient, *ctx.saved_tensors, *ctx.options), None, None, None


def mapped(op: Any, tensors: int) -> Any:
    """`rowwise` for an op with options behind its tensors."""

    def rule(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
        options = given[tensors:]
        return rowwise(lambda *x: op(*x, *options))(info, in_dims[:tensors], *given[:tensors])

    return rule


OPTIONS = "str activation, bool full_space, bool shifted"
_backward = define(
    "linear_activation_bwd",
    f"(Tensor gradient, Tensor phi, {OPTIONS}) -> Tensor",
    _differentiate_activation,
    fake_gradient,
    vmap=mapped(lambda *given: _backward(*given), 2),
)
_forward = define(
    "linear_activation_fwd",
    f"(Tensor z, {OPTIONS}) -> Tensor",
    _activate,
    fake,
    backward=_of_forward,
    setup_context=save_result,
    vmap=mapped(lambda *given: _forward(*given), 1),
)


def features(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "softmax_dim",
    full_space: bool = True,
    skip: bool = False,
    shifted: bool = False,
) -> Tensor:
    """phi(x) [B, h, n, F or 2 F] of x [B, h, n, D]: `activate` of `project`."""
    return activate(project(x, weight, bias, skip), activation, full_space, shifted=shifted)


def learned(
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    full_space: bool,
    skip: bool,
    *,
    of_queries: bool,
) -> Feature:
    """The map as the engine's forms take it; `apply.keywords` are the arguments of `features`."""
    shifted = of_queries and activation == "exp"
    name = f"hedgehog:{activation}{'_shifted' if shifted else ''}"
    name += ":half" if activation in TWO_SIDED and not full_space else ""
    operands = {"weight": weight, "bias": bias, "skip": skip}
    kept = {"activation": activation, "full_space": full_space, "shifted": shifted}
    channels = None if weight is None else weight.shape[-1]
    return Feature(
        name,
        partial(features, **operands, **kept),
        width=lambda D: width(activation, channels or D, full_space),
        weights=tuple(x for x in (weight, bias) if x is not None),
        project=partial(project, **operands),
    )


def check_maps(
    op: str,
    sizes: Sizes,
    q: Tensor,
    maps: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    activation: Any,
    full_space: Any,
    skip: Any,
) -> int:
    """Raises for what does not fit; the heads of the features of keys: Hk, or H."""
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_flag(op, "full_space", full_space)
    check_flag(op, "skip", skip)
    if not full_space and activation not in TWO_SIDED:
        accepted = f"True with activation={activation!r}, which has no half to leave out"
        raise reject(op, "full_space", accepted, full_space)
    channels, key_heads = [], sizes.Hk
    for side, weight, bias in zip("qk", maps, biases, strict=True):
        heads = (1, sizes.H) if side == "q" else (1, sizes.Hk, sizes.H)
        F = sizes.D
        if weight is not None:
            name = f"map_{side}"
            fits = isinstance(weight, Tensor) and weight.dim() == 3 and weight.shape[2] > 0
            F = weight.shape[2] if fits else sizes.D
            check_float_operand(op, name, weight, (heads, sizes.D, F), q)
            if skip and sizes.D != F:
                raise reject(op, name, f"onto {sizes.D} channels with skip", weight)
        if bias is not None:
            flat = isinstance(bias, Tensor) and bias.dim() == 1
            check_float_operand(op, f"bias_{side}", bias, (heads,) if flat else (heads, F), q)
        channels.append(F)
        if side == "k":
            given = [x.shape[0] for x in (weight, bias) if x is not None]
            key_heads = max([sizes.Hk, *given])
    if skip and maps == (None, None):
        raise reject(op, "skip", "False without maps to skip", skip)
    if channels[0] != channels[1]:
        name, other = ("map_k", 0) if maps[1] is not None else ("map_q", 1)
        accepted = f"onto {channels[other]} channels, as the other side's features"
        raise reject(op, name, accepted, maps[1] if maps[1] is not None else maps[0])
    return key_heads


def to_heads(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated to `heads`, where every query head has a map of keys of its own."""
    if x.shape[1] == heads:
        return x
    return x.repeat_interleave(heads // x.shape[1], 1)
