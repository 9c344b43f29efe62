"""The backward of the native form: a call of C, and in eager float64 what it could not solve."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.native import chosen, function, no_memory
from regard.ops.local_linear import backward as gradients
from regard.ops.local_linear.backward import Wanted
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.native.forward import OP, call_of
from regard.ops.local_linear.native.library import AVERAGE, GIVEN, SOLVED, Call, Operand, operand
from regard.ops.local_linear.registered import Options

_FLAGS = (
    "frozen", "probed", "solves", "refines", "rescues", "wants_q", "wants_k", "wants_v",
    "wants_scale",
)  # fmt: skip
_RESULTS = ("q", "k", "v", "ridge", "scale", "row", "probe", "columns", "failed")


class Backward(ctypes.Structure):
    """`backward.h` field by field."""

    _fields_ = [
        ("call", Call),
        ("grad", Operand),
        ("slope", Operand),
        ("factors", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _FLAGS),
        *((name, ctypes.c_void_p) for name in _RESULTS),
    ]


def backward(
    inputs: Inputs,
    options: Options,
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    extras: tuple[Tensor, ...],
    wanted: Wanted,
) -> tuple[Tensor, ...]:
    """Gradients in the order of `Wanted`; an empty tensor where none was wanted."""
    sums = gradients.no_sums(inputs, wanted)
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        return gradients.finish(inputs, sums, wanted)
    solver = options.solver(inputs.q.shape[3], backward=True)
    call, kept = call_of(inputs, solver)
    solved = call.mode == SOLVED
    if call.mode == AVERAGE:
        call.mode = GIVEN  # g = 0, and the weights of all keys are kept
    grad, slope = (x.detach().to(torch.float32) for x in (grad, slope))
    failed = inputs.q.new_zeros(lse.shape, dtype=torch.bool)
    row = torch.zeros_like(sums.row, dtype=torch.float32)
    rescues = solved and solver.rescues(inputs.dtype)
    refines = solver.tol == 0 or solver.tol < options.tol
    flags = (
        inputs.frozen, not inputs.average, wanted.solve, refines, rescues, wanted.q, wanted.k,
        wanted.v, wanted.scale,
    )  # fmt: skip
    results = (
        sums.q, sums.k, sums.v, sums.ridge, sums.scale, row, sums.probe, sums.column, failed,
    )  # fmt: skip
    _run(
        Backward(
            call, operand(grad, "bhrc"), operand(slope, "bhrc"),
            extras[0].data_ptr() if extras else None, *map(int, flags),
            *(x.data_ptr() if x.numel() else None for x in results),
        )
    )  # fmt: skip
    del kept
    sums.row.copy_(row)
    found = gradients.finish(inputs, sums, wanted)
    if rescues and bool(failed.any()):
        more = gradients.rescue(
            inputs, (grad, slope, lse), wanted, solver, options.block_size, failed
        )
        found = tuple(x + y.to(x.dtype) for x, y in zip(found, more, strict=True))
    return found


def _run(call: Backward) -> None:
    if _kernel(chosen())(ctypes.byref(call)):
        raise no_memory(OP)


@cache
def _kernel(isa: str | None) -> Any:
    """The backward of the best instruction set, or of one."""
    size = function(OP, "local_linear_backward_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != ctypes.sizeof(Backward):
        raise RuntimeError(f"{OP}: backward.h and backward.py disagree about the size of a call")
    run = function(OP, "local_linear_backward", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.POINTER(Backward)]
    return run
