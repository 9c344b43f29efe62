"""Every compiled form of the engine as a pair of operators, `regard::<name>_fwd` and `_bwd`.

All have one schema: fakes, autograd and vmap are written once. A form brings two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.decay import DecaySums
from regard.core.library import define
from regard.core.precision import compute_dtype, without_autocast
from regard.ops.local_linear import backward as gradients
from regard.ops.local_linear import blockwise
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.solve import Solver, wants_precision

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor ridge, Tensor scale, Tensor? key_mask, "
    "Tensor? key_bias, Tensor? decay_sums, Tensor? decay_first, Tensor? row_bias, "
    "Tensor? probe"
)
_OPTIONS = (
    "bool causal, int left, int right, bool absolute, bool intercept, bool frozen, "
    "int covariance_block, bool average, bool direct, float tol, float tol_backward, "
    "int max_iters, int block_size, str precision"
)
_GRADIENTS = ("q", "k", "v", "ridge", "scale", "key_bias", "decay_sums", "row_bias", "probe")
_NAMES = (
    "q", "k", "v", "ridge", "scale", "key_mask", "key_bias", "decay_sums", "decay_first",
    "row_bias", "probe",
)
_COUNT = len(_NAMES)
_OF_INPUTS = 8  # the first options belong to `Inputs`, the others to `Options`


@dataclass(frozen=True)
class Options:
    """How a form is to compute: nothing here changes what is computed."""

    direct: bool
    tol: float
    tol_backward: float
    max_iters: int  # 0: 2 D + 8
    block_size: int  # 0: by the sizes
    precision: str

    def solver(self, D: int, *, backward: bool = False) -> Solver:
        """Of the forward, or of the backward, for a head size."""
        iterations = self.max_iters if self.max_iters > 0 else 2 * D + 8
        precise = wants_precision(self.direct, self.tol)  # of the forward for both
        tol = self.tol_backward if backward else self.tol
        return Solver(self.direct, tol, iterations, precise)


class Extra(NamedTuple):
    """One more result of a form's forward, kept for its own backward; batch is the first axis."""

    name: str
    shape: Callable[[Inputs], Sequence[int]]
    dtype: torch.dtype = torch.float32


Forward = Callable[[Inputs, Options], Sequence[Tensor]]
Backward = Callable[
    [Inputs, Options, Tensor, Tensor, Tensor, tuple[Tensor, ...], gradients.Wanted],
    tuple[Tensor, ...],
]


def inputs_of(operands: Sequence[Any], options: Sequence[Any]) -> Inputs:
    """The arguments of a registered op by name."""
    q, k, v, ridge, scale, key_mask, key_bias, sums, first, row_bias, probe = operands
    causal, left, right, absolute, intercept, frozen, covariance_block, average = options[:8]
    decay = None if sums is None else DecaySums(sums, first)
    window = (left, right)
    return Inputs(
        q, k, v, ridge, scale, key_mask, key_bias, decay, causal, window, absolute, intercept,
        frozen, covariance_block, row_bias, probe, average,
    )


def register(
    name: str, forward: Forward, backward: Backward, extras: tuple[Extra, ...] = ()
) -> Callable[..., tuple[Tensor, ...]]:
    """Defines `regard::<name>_fwd` and `regard::<name>_bwd` and returns the former.

    `forward(inputs, options)` returns out [B, H, T, Dv] in q's dtype, slope [B, H, T, D] and
    lse [B, H, T] in the compute dtype, iterations (int32) and residual [B, H, T], and `extras`.
    `backward(inputs, options, grad, slope, lse, extras, wanted)` returns a gradient for each
    name of `Wanted`, in the shape and dtype of its operand; an empty tensor where none is wanted.
    """
    pair = _Pair(name, forward, backward, extras)
    saved = "".join(f", Tensor {extra.name}" for extra in extras)
    pair.bwd = define(
        f"{name}_bwd",
        f"(Tensor grad, Tensor slope, Tensor lse{saved}, bool[] wanted, "
        f"{_OPERANDS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * len(_GRADIENTS))})",
        pair.run_backward,
        pair.fake_backward,
        backward=_no_double_backward,
        vmap=pair.vmap_backward,
    )
    pair.fwd = define(
        f"{name}_fwd",
        f"({_OPERANDS}, {_OPTIONS}) -> (Tensor out, Tensor slope, Tensor lse, "
        f"Tensor iterations, Tensor residual{saved})",
        pair.run_forward,
        pair.fake_forward,
        backward=pair.differentiate,
        setup_context=pair.save,
        vmap=pair.vmap_forward,
    )
    return pair.fwd


@dataclass
class _Pair:
    """What the two operators of a form do in each of torch's worlds."""

    name: str
    forward: Forward
    backward: Backward
    extras: tuple[Extra, ...]
    fwd: Any = None
    bwd: Any = None

    @property
    def saved(self) -> int:
        """Tensors before `wanted` among the backward's arguments."""
        return 3 + len(self.extras)

    def run_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        operands, options = arguments[:_COUNT], arguments[_COUNT:]
        with without_autocast(operands[0]):
            return tuple(self.forward(inputs_of(operands, options), Options(*options[_OF_INPUTS:])))

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        operands, options = arguments[:_COUNT], arguments[_COUNT:]
        q, v = operands[0], operands[2]
        rows, dtype = q.shape[:3], compute_dtype(q.dtype)
        inputs = inputs_of(operands, options)
        return (
            q.new_empty(*rows, v.shape[3]),
            q.new_empty(q.shape, dtype=dtype),
            q.new_empty(rows, dtype=dtype),
            q.new_empty(rows, dtype=torch.int32),
            q.new_empty(rows, dtype=dtype),
            *(q.new_empty(extra.shape(inputs), dtype=extra.dtype) for extra in self.extras),
        )

    def _parts(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Saved tensors, wanted, operands and options of the backward."""
        at = self.saved
        rest = arguments[at + 1 :]
        return arguments[:at], arguments[at], rest[:_COUNT], rest[_COUNT:]

    def run_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        (grad, slope, lse, *extras), wanted, operands, options = self._parts(arguments)
        with without_autocast(operands[0]):
            return self.backward(
                inputs_of(operands, options), Options(*options[_OF_INPUTS:]), grad, slope, lse,
                tuple(extras), gradients.Wanted(*wanted),
            )

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, wanted, operands, _ = self._parts(arguments)
        named = dict(zip(_NAMES, operands, strict=True))
        return tuple(
            named[name].new_empty(named[name].shape) if want else operands[0].new_empty(0)
            for name, want in zip(_GRADIENTS, wanted, strict=True)
        )

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, slope, lse, _, _, *extras = output
        ctx.save_for_backward(*inputs[:_COUNT], slope, lse, *extras)
        ctx.options = inputs[_COUNT:]

    def differentiate(self, ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():  # nothing will be recorded: nor should the op look so
            saved = [x if x is None else x.detach() for x in saved]
        operands, of_rows = saved[:_COUNT], saved[_COUNT:]
        needed = dict(zip(_NAMES, ctx.needs_input_grad, strict=False))
        wanted = [needed[name] for name in _GRADIENTS]
        grads = self.bwd(grad, *of_rows, wanted, *operands, *ctx.options)
        found = {name: g for name, g, w in zip(_GRADIENTS, grads, wanted, strict=True) if w}
        return tuple(found.get(name) for name in _NAMES) + (None,) * len(ctx.options)

    def vmap_forward(self, info: Any, axes: tuple[Any, ...], *arguments: Any) -> Any:
        count, batch = info.batch_size, _batch_of(arguments[0], axes[0])
        pairs = zip(arguments[:_COUNT], axes, strict=False)
        operands = [_batched(x, axis, count, batch) for x, axis in pairs]
        results = self.fwd(*operands, *arguments[_COUNT:])
        return tuple(x.unflatten(0, (count, batch)) for x in results), (0,) * len(results)

    def vmap_backward(self, info: Any, axes: tuple[Any, ...], *arguments: Any) -> Any:
        saved, wanted, operands, options = self._parts(arguments)
        _, _, axes_of_operands, _ = self._parts(axes)
        count, batch = info.batch_size, _batch_of(operands[0], axes_of_operands[0])
        of_rows = [
            _batched(x, axis, count, batch) for x, axis in zip(saved, axes, strict=False)
        ]
        tensors = [
            _batched(x, axis, count, batch)
            for x, axis in zip(operands, axes_of_operands, strict=True)
        ]
        grads = self.bwd(*of_rows, wanted, *tensors, *options)
        named = dict(
            zip(_NAMES, zip(operands, axes_of_operands, strict=True), strict=True)
        )
        results = []
        for name, grad, want in zip(_GRADIENTS, grads, wanted, strict=True):
            if want:
                grad = grad.unflatten(0, (count, batch))
                operand, axis = named[name]
                if _batch_of(operand, axis) != batch:  # it was shared by the batch
                    grad = grad.sum(1, keepdim=True)
            results.append(grad)
        return tuple(results), tuple(0 if want else None for want in wanted)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "local linear attention, or Parallax: the compiled forms are differentiable once; "
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


def _eager_forward(inputs: Inputs, options: Options) -> Sequence[Tensor]:
    inputs = _with_probe(inputs)
    if inputs.probe is not None:
        return blockwise.forward_given(inputs, inputs.probe, options.block_size)
    return blockwise.forward(inputs, options.solver(inputs.q.shape[3]), options.block_size)


def _eager_backward(
    inputs: Inputs,
    options: Options,
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    extras: tuple[Tensor, ...],
    wanted: gradients.Wanted,
) -> tuple[Tensor, ...]:
    solver = options.solver(inputs.q.shape[3], backward=True)
    inputs = _with_probe(inputs)
    return gradients.backward(inputs, grad, slope, lse, wanted, solver, options.block_size)


def _with_probe(inputs: Inputs) -> Inputs:
    """g = 0 where an average is asked for."""
    if not inputs.average:
        return inputs
    return replace(inputs, probe=torch.zeros_like(inputs.q), average=False)


local_linear_fwd = register("local_linear", _eager_forward, _eager_backward)
