"""The largest numbers of every row: in one reading of the row on a CPU, where C was compiled."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.native import chosen, function, refusal

MOST = 16  # of more the insertion, one by one, takes as long as a sort
THREADS = 4  # torch's way, which is five times as long, is faster with more


def largest(
    x: Float[Tensor, "*n s"], count: int
) -> tuple[Float[Tensor, "*n k"], Int[Tensor, "*n k"]]:
    """The `count` largest numbers along the last axis in falling order, and their places (int32).

    As `torch.topk`, NaN first; of equal numbers the first ones, in C. `count` is at most the
    length of the axis and no gradient passes.

    >>> values, places = largest(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 3)
    >>> values.tolist(), sorted(places[0, :2].tolist()), places[0, 2].item()
    ([[3.0, 3.0, 2.0]], [1, 3], 2)
    """
    in_c = x.device.type == "cpu" and x.dtype == torch.float32 and 0 < count <= MOST
    in_c = in_c and torch.get_num_threads() <= THREADS
    if not in_c or refusal() is not None:
        values, places = x.topk(count, -1)
        return values, places.int()
    x, width = x.detach().contiguous(), x.shape[-1]
    values = x.new_empty(*x.shape[:-1], count)
    places = torch.empty_like(values, dtype=torch.int32)
    rows = x.numel() // width
    _kernel(chosen())(x.data_ptr(), rows, width, count, values.data_ptr(), places.data_ptr())
    return values, places


@cache
def _kernel(isa: str | None) -> Any:
    run = function("largest", "largest", isa)
    run.restype = None
    run.argtypes = [ctypes.c_void_p, *3 * (ctypes.c_int64,), *2 * (ctypes.c_void_p,)]
    return run
