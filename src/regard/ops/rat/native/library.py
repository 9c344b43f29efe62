"""The C structures of `call.h` field by field, and the functions that take them."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from torch import Tensor

from regard.native import chosen, function, no_memory

OP = "rat_attention"

_COUNTS = (
    "batch", "heads", "key_heads", "queries", "places", "channels", "chunk", "threads", "past",
    "offset", "place_rows", "count_rows", "table_rows",
)  # fmt: skip


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


class Rows(ctypes.Structure):
    """A tensor [B, heads, rows, D], dense in D."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
    ]


class Call(ctypes.Structure):
    """The forward of attention."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("scale", ctypes.c_double),
        *((name, Rows) for name in ("q", "k", "v")),
        *_pointers("past_k", "past_v", "place", "past_count", "cosine", "sine", "out", "lse"),
    ]


class Backward(ctypes.Structure):
    """Its backward."""

    _fields_ = [
        ("call", Call),
        ("grad", Rows),
        *_pointers("dq", "dk", "dv", "d_past_k", "d_past_v"),
    ]


class Scan(ctypes.Structure):
    """The average inside of chunks, forward or backward."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "places", "channels", "chunk", "threads")
        ),
        *((name, Rows) for name in ("x", "gate", "result", "grad")),
        *_pointers("carry", "out", "d_x", "d_gate", "d_carry"),
    ]


def rows(x: Tensor) -> Rows:
    """A float32 tensor that `dense` has made."""
    return Rows(x.data_ptr(), *x.stride()[:3])


def dense(x: Tensor) -> Tensor:
    """Dense in its last axis."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def run(name: str, call: Any) -> None:
    """Calls `regard_rat_<name>`; out of memory is a `MemoryError`."""
    if _kernel(name, chosen())(ctypes.byref(call)):
        raise no_memory(OP)


@cache
def _kernel(name: str, isa: str | None) -> Any:
    """Of the best instruction set, or of one."""
    for structure, kind in ((Call, "call"), (Backward, "backward"), (Scan, "scan")):
        size = function(OP, f"rat_{kind}_size", isa)
        size.restype, size.argtypes = ctypes.c_int64, []
        if size() != ctypes.sizeof(structure):
            raise RuntimeError(f"{OP}: call.h and library.py disagree about the size of {kind}")
    found = function(OP, f"rat_{name}", isa)
    found.restype, found.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    return found
