"""The C structures of `call.h` field by field, and the functions that take them."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from torch import Tensor

from regard.native import function
from regard.ops.linear.problem import Problem

NO_NORMALISER, BY_SUM, BY_CLAMP = 0, 1, 2

_INTEGERS = (
    "batch", "heads", "key_heads", "tokens", "features", "channels", "per_channel", "normaliser",
    "threads",
)  # fmt: skip
OPERANDS = ("q", "k", "v", "log_decay", "beta")
_POINTERS = ("state", "total", "out", "weight", "last_state", "last_total")
_GRADIENTS = (
    "given_weight", "d_last_state", "d_last_total", "dq", "dk", "dv", "d_log_decay", "d_beta",
    "d_state", "d_total",
)  # fmt: skip


class Operand(ctypes.Structure):
    """A tensor by pointer and strides; all zero where there is none."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "token")),
    ]


class Map(ctypes.Structure):
    """What queries or keys become inside a walk; all zero: what they are."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "kind", "inner", "name", "full", "shifted", "skip", "weights", "biases", "columns",
        )),
        ("scale", ctypes.c_double),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """Everything that a kernel of this folder is told."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("minimum", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        *((name, Operand) for name in OPERANDS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("d_out", Operand),
        ("given_out", Operand),
        *((name, ctypes.c_void_p) for name in _GRADIENTS),
        ("query_map", Map),
        ("key_map", Map),
    ]


def divisor(problem: Problem) -> tuple[int, float]:
    """What outputs are divided by, and the clamp of that."""
    minimum = problem.minimum
    if problem.normaliser is None:
        return NO_NORMALISER, 0.0
    return (BY_SUM, 0.0) if minimum is None else (BY_CLAMP, minimum)


def operand(x: Tensor | None) -> Operand:
    """A float32 tensor [B, H, T] or [B, H, T, c], whose last of four axes is contiguous."""
    return Operand() if x is None else Operand(x.data_ptr(), *x.stride()[:3])


def pointer(x: Tensor | None) -> int | None:
    """Where a contiguous tensor is; None for none."""
    return None if x is None else x.data_ptr()


@cache
def kernel(op: str, name: str, isa: str | None) -> Any:
    """`regard_linear_<name>` for a pointer to a `Call`, of the best or of one set."""
    size = function(op, "linear_call_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != ctypes.sizeof(Call):
        raise RuntimeError(f"{op}: call.h and library.py disagree about the size of a call")
    run = function(op, f"linear_{name}", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.POINTER(Call)]
    return run
