"""What `Reduce` sums up from blocks of scores, in C on a CPU: every score is read once."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.lens.largest import MOST
from regard.lens.taps.call import Attention
from regard.native import chosen, function, refusal

THREADS = 2  # torch's own passes, which take three times as long, are faster with more

_INTEGERS = ("batch", "heads", "rows", "keys", "queries", "wanted")
_POINTERS = ("scores", "real", "entropy", "received", "shares")


class Call(ctypes.Structure):
    """The structure of `sums.c`, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("shares_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("map", "top", "places")),
    ]


def serves(attention: Attention, top: int) -> bool:
    """Whether the sums of this call can be formed here."""
    q, keys = attention.q, attention.k.shape[2]
    here = (
        q.device.type == "cpu" and q.dtype == torch.float32 and torch.get_num_threads() <= THREADS
    )
    return here and attention.is_plain and keys > 0 and top <= MOST and refusal() is None


@dataclass
class Sums:
    """What is being summed up of one call with T queries; None where nobody asks.

    Attributes:
        real: queries that count.
        entropy: in float64.
        received: weight per key.
        shares: weight by key - query, from -T on.
        map: mean of the heads' weights.
        top, places: weights in falling order, and their keys (int32).
    """

    real: Bool[Tensor, "b t"] | None = None
    entropy: Float[Tensor, " h"] | None = None
    received: Float[Tensor, "b h s"] | None = None
    shares: Float[Tensor, "h n"] | None = None
    map: Float[Tensor, "b t s"] | None = None
    top: Float[Tensor, "b h t k"] | None = None
    places: Int[Tensor, "b h t k"] | None = None

    def of_batch(self, some: slice) -> Sums:
        """The same sums, of some elements of the batch."""
        parts = {name: getattr(self, name) for name in ("real", "received", "map", "top", "places")}
        return replace(self, **{n: None if x is None else x[some] for n, x in parts.items()})


def add_block(sums: Sums, scores: Float[Tensor, "b h r s"], rows: range, queries: int) -> None:
    """Add some rows of so many queries to the sums, whose tensors are contiguous."""
    B, H, R, S = scores.shape
    scores, real = scores.contiguous(), None if sums.real is None else sums.real.contiguous()
    count, at, shares = 0 if sums.top is None else sums.top.shape[3], rows.start, sums.shares
    call = Call(
        batch=B, heads=H, rows=R, keys=S, queries=queries, wanted=count,
        scores=scores.data_ptr(),
        real=_pointer(real, at),
        entropy=_pointer(sums.entropy, 0),
        received=_pointer(sums.received, 0),
        shares=_pointer(shares, queries - rows.stop + 1),
        shares_step=0 if shares is None else shares.shape[1],
        map=_pointer(sums.map, at * S),
        top=_pointer(sums.top, at * count),
        places=_pointer(sums.places, at * count),
    )  # fmt: skip
    if _kernel(chosen())(call):
        raise MemoryError(f"Reduce: no memory for a row of {S} weights")


def _pointer(x: Tensor | None, offset: int) -> int | None:
    return None if x is None else x.data_ptr() + offset * x.element_size()


@cache
def _kernel(isa: str | None) -> Any:
    size = function("Reduce", "lens_sums_call_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != ctypes.sizeof(Call):
        raise RuntimeError("Reduce: sums.c and sums.py disagree about the size of a call")
    run = function("Reduce", "lens_sums", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.POINTER(Call)]
    return run
