"""The C structures of `call.h` field by field, and the functions that take them."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.native import function

SOLVED, GIVEN, AVERAGE = 0, 1, 2  # where the probe g comes from

_INTEGERS = (
    "batch", "heads", "key_heads", "queries", "keys", "channels", "value_channels", "bias_heads",
    "decay_heads", "left", "right", "causal", "banded", "intercept", "absolute", "mode", "direct",
    "precise", "max_iters", "threads",
)  # fmt: skip
_OPERANDS = (
    "q", "k", "v", "probe", "ridge", "scale", "key_mask", "key_bias", "decay_sums", "decay_first",
    "row_bias",
)  # fmt: skip
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RESULTS = ("out", "slope", "lse", "iterations", "residual", "failed", "factors")


class Operand(ctypes.Structure):
    """A tensor by pointer and strides; all zero where there is none."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row", "column", "half")),
    ]


class Call(ctypes.Structure):
    """Everything that a kernel of this folder is told."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("tol", ctypes.c_double),
        *((name, Operand) for name in _OPERANDS),
        *((name, ctypes.c_void_p) for name in _RESULTS),
    ]


def operand(x: Tensor | None, axes: str) -> Operand:
    """A tensor whose axes are named, by one letter each, `b`atch, `h`ead, `r`ow and `c`olumn."""
    if x is None:
        return Operand()
    strides = dict(zip(axes, x.stride(), strict=True))
    kind = _KINDS.get(x.dtype, 0)
    return Operand(x.data_ptr(), *(strides.get(axis, 0) for axis in "bhrc"), kind)


@cache
def kernel(op: str, name: str, isa: str | None) -> Any:
    """`regard_local_linear_<name>` for a pointer to a `Call`, of the best or of one set."""
    size = function(op, "local_linear_call_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != ctypes.sizeof(Call):
        raise RuntimeError(f"{op}: call.h and library.py disagree about the size of a call")
    run = function(op, f"local_linear_{name}", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.POINTER(Call)]
    return run
