"""The blockwise form as `regard::local_linear_fwd` and `regard::local_linear_bwd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.decay import DecaySums
from regard.core.library import define
from regard.core.precision import compute_dtype, without_autocast
from regard.ops.local_linear import backward as gradients
from regard.ops.local_linear import blockwise
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.solve import Solver

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor ridge, Tensor scale, Tensor? key_mask, "
    "Tensor? key_bias, Tensor? decay_sums, Tensor? decay_first, Tensor? row_bias, "
    "Tensor? probe"
)
_OPTIONS = (
    "bool causal, int left, int right, bool absolute, bool intercept, bool frozen, "
    "int covariance_block, bool direct, float tol, float tol_backward, int max_iters, "
    "int block_size"
)
_GRADIENTS = ("q", "k", "v", "ridge", "scale", "key_bias", "decay_sums", "row_bias", "probe")
_NAMES = (
    "q", "k", "v", "ridge", "scale", "key_mask", "key_bias", "decay_sums", "decay_first",
    "row_bias", "probe",
)
_COUNT = len(_NAMES)


def inputs_of(operands: tuple[Any, ...], options: tuple[Any, ...]) -> Inputs:
    """The arguments of the registered op by name."""
    q, k, v, ridge, scale, key_mask, key_bias, sums, first, row_bias, probe = operands
    causal, left, right, absolute, intercept, frozen, covariance_block = options[:7]
    decay = None if sums is None else DecaySums(sums, first)
    window = (left, right)
    return Inputs(
        q, k, v, ridge, scale, key_mask, key_bias, decay, causal, window, absolute, intercept,
        frozen, covariance_block, row_bias, probe,
    )


def _solver(q: Tensor, direct: bool, tol: float, max_iters: int) -> Solver:
    return Solver(direct, tol, max_iters if max_iters > 0 else 2 * q.shape[3] + 8)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    operands, options = arguments[:_COUNT], arguments[_COUNT:]
    direct, tol, _, max_iters, block_size = options[7:]
    with without_autocast(operands[0]):
        inputs = inputs_of(operands, options)
        if inputs.probe is not None:
            return tuple(blockwise.forward_given(inputs, inputs.probe, block_size))
        solver = _solver(inputs.q, direct, tol, max_iters)
        return tuple(blockwise.forward(inputs, solver, block_size))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    q, v = arguments[0], arguments[2]
    rows, dtype = q.shape[:3], compute_dtype(q.dtype)
    return (
        q.new_empty(*rows, v.shape[3]),
        q.new_empty(q.shape, dtype=dtype),
        q.new_empty(rows, dtype=dtype),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows, dtype=dtype),
    )


def _backward(
    grad: Tensor, slope: Tensor, lse: Tensor, wanted: list[bool], *rest: Any
) -> tuple[Tensor, ...]:
    operands, options = rest[:_COUNT], rest[_COUNT:]
    direct, _, tol, max_iters, block_size = options[7:]
    with without_autocast(operands[0]):
        inputs = inputs_of(operands, options)
        solver = _solver(inputs.q, direct, tol, max_iters)
        return gradients.backward(
            inputs, grad, slope, lse, gradients.Wanted(*wanted), solver, block_size
        )


def _backward_fake(
    grad: Tensor, slope: Tensor, lse: Tensor, wanted: list[bool], *rest: Any
) -> tuple[Tensor, ...]:
    named = dict(zip(_NAMES, rest[:_COUNT], strict=True))
    q = named["q"]
    return tuple(
        named[name].new_empty(named[name].shape) if want else q.new_empty(0)
        for name, want in zip(_GRADIENTS, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, slope, lse, _, _ = output
    ctx.save_for_backward(*inputs[:_COUNT], slope, lse)
    ctx.options = inputs[_COUNT:]


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if not torch.is_grad_enabled():  # nothing will be recorded: the op need not look as if it were
        saved = [x if x is None else x.detach() for x in saved]
    *operands, slope, lse = saved
    needed = dict(zip(_NAMES, ctx.needs_input_grad, strict=False))
    wanted = [needed[name] for name in _GRADIENTS]
    grads = _bwd(grad, slope, lse, wanted, *operands, *ctx.options)
    found = {name: g for name, g, w in zip(_GRADIENTS, grads, wanted, strict=True) if w}
    return tuple(found.get(name) for name in _NAMES) + (None,) * len(ctx.options)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "local linear attention, or Parallax: the blockwise form is differentiable once; "
        "use impl='reference' for derivatives of the gradient"
    )


def _batched(x: Tensor | None, axis: int | None, count: int, batch: int) -> Tensor | None:
    """An operand of a vmapped call with the mapped axis folded into the batch."""
    if x is None:
        return None
    x = x.expand(count, *x.shape) if axis is None else x.movedim(axis, 0)
    return x.expand(count, batch, *x.shape[2:]).flatten(0, 1)


def _batch_of(q: Tensor, axis: int | None) -> int:
    return q.shape[1 if axis == 0 else 0]


def _forward_vmap(info: Any, axes: tuple[Any, ...], *arguments: Any) -> Any:
    count, batch = info.batch_size, _batch_of(arguments[0], axes[0])
    pairs = zip(arguments[:_COUNT], axes, strict=False)
    operands = [_batched(x, axis, count, batch) for x, axis in pairs]
    results = local_linear_fwd(*operands, *arguments[_COUNT:])
    return tuple(x.unflatten(0, (count, batch)) for x in results), (0,) * len(results)


def _backward_vmap(info: Any, axes: tuple[Any, ...], *arguments: Any) -> Any:
    count, batch, wanted = info.batch_size, _batch_of(arguments[4], axes[4]), arguments[3]
    last = 4 + _COUNT
    places = (0, 1, 2, *range(4, last))
    tensors = [_batched(arguments[i], axes[i], count, batch) for i in places]
    grads = _bwd(*tensors[:3], wanted, *tensors[3:], *arguments[last:])
    named = dict(zip(_NAMES, zip(arguments[4:last], axes[4:last], strict=True), strict=True))
    results = []
    for name, grad, want in zip(_GRADIENTS, grads, wanted, strict=True):
        if want:
            grad = grad.unflatten(0, (count, batch))
            operand, axis = named[name]
            if _batch_of(operand, axis) != batch:  # it was shared by the batch
                grad = grad.sum(1, keepdim=True)
        results.append(grad)
    return tuple(results), tuple(0 if want else None for want in wanted)


_bwd = define(
    "local_linear_bwd",
    "(Tensor grad, Tensor slope, Tensor lse, bool[] wanted, "
    f"{_OPERANDS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * len(_GRADIENTS))})",
    _backward,
    _backward_fake,
    backward=_no_double_backward,
    vmap=_backward_vmap,
)
local_linear_fwd = define(
    "local_linear_fwd",
    f"({_OPERANDS}, {_OPTIONS}) -> (Tensor out, Tensor slope, Tensor lse, "
    "Tensor iterations, Tensor residual)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_save,
    vmap=_forward_vmap,
)
