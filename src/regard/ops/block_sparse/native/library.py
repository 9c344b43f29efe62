"""The C structure of `call.h` field by field, and the functions that take it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from torch import Tensor

from regard.native import chosen, function, no_memory

LEVELS, BLOCKS, BOXES = 0, 1, 2  # where lists come from
BAD_PLAN = -2  # what a kernel returns for a level or an index that may not be

_NUMBERS = (
    "batch", "heads", "key_heads", "queries", "rows", "keys", "channels", "value_channels",
    "kind", "plan_batch", "plan_heads", "lists", "width", "block_q", "block_k", "left", "right",
    "replicate", "pools", "bias_heads", "threads",
)  # fmt: skip
_OPERANDS = ("q", "k", "v", "bias", "plan", "offsets", "mask_at", "start", "length", "masks")
_RESULTS = ("order", "out", "lse", "d_out", "dq", "dk", "dv", "d_bias")


class Call(ctypes.Structure):
    """Everything that a kernel of this folder is told."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _OPERANDS),
        ("mask_width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _RESULTS),
    ]


def call_of(numbers: dict[str, int | float], tensors: dict[str, Tensor | None]) -> Call:
    """A call with contiguous tensors by pointer, which must live as long as it does."""
    pointers = {
        name: None if x is None or not x.numel() else x.data_ptr() for name, x in tensors.items()
    }
    return Call(**numbers, **pointers)


def run(op: str, name: str, call: Call) -> int:
    """`regard_block_sparse_<name>`: 0 or `BAD_PLAN`; out of memory is a `MemoryError`."""
    code = _kernel(op, name, chosen())(ctypes.byref(call))
    if code not in (0, BAD_PLAN):
        raise no_memory(op)
    return code


@cache
def _kernel(op: str, name: str, isa: str | None) -> Any:
    size = function(op, "block_sparse_call_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != ctypes.sizeof(Call):
        raise RuntimeError(f"{op}: call.h and library.py disagree about the size of a call")
    kernel = function(op, f"block_sparse_{name}", isa)
    kernel.restype, kernel.argtypes = ctypes.c_int64, [ctypes.POINTER(Call)]
    return kernel
