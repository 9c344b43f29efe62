"""The native form: plain C on CPUs, see `regard.native`. The files, C and Python:

- `call.h`, `library.py`: what a kernel is told
- `keys.h`, `tile.h`: a key head and a tile of queries made ready
- `weigh.h`, `cg.h`, `direct.h`, `forward.c`: weights, the two solvers, the forward
- `backward.h`, `contribution.h`, `backward.c`: the backward
- `rows.h`, `chunk.h`, `row_solve.h`, `decode.c`: a few rows against a long cache
- `forward.py`, `backward.py`, `decode.py`: from the operands of the registered op to C
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.native import refusal
from regard.ops.local_linear import registered
from regard.ops.local_linear.call import Answer, Call, run
from regard.ops.local_linear.native import decode
from regard.ops.local_linear.native.backward import backward
from regard.ops.local_linear.native.forward import factors_shape, forward, forward_keeping
from regard.ops.local_linear.solve import EVIDENCE

MOST_KEYS = 1 << 30  # numbers of keys are kept in 32 bits

# Heads of up to this size keep the factors of the direct solve for the backward: 136 numbers for
# each query that make it 1.5 times as fast.
MOST_KEPT_CHANNELS = 16

# The largest ridge, by head size, at which "auto" solves directly. In C the covariances cost as
# much as 4, 9, 20 and 36 iterations at D = 16, 32, 64 and 128, however few rows there are.
_DIRECT_UP_TO = ((16, 3.0), (32, 0.03), (64, 0.003), (128, 0.001))
_DIRECT_UP_TO_WITH_HALF = ((8, 3.0), (16, 1.0), (32, 0.03))  # to fewer digits

local_linear_native_fwd = registered.register("local_linear_native", forward, backward)
local_linear_native_kept_fwd = registered.register(
    "local_linear_native_kept", forward_keeping, backward,
    (registered.Extra("factors", factors_shape),),
)  # fmt: skip


def unavailable(q: Tensor, k: Tensor) -> str | None:
    """Why no kernel of this folder takes such queries and keys, or None."""
    if q.device.type not in ("cpu", "meta"):
        return f"it runs on a CPU, not on {q.device.type}"
    if q.dtype == torch.float64:
        return "it computes in float32"
    if k.shape[2] > MOST_KEYS:
        return f"it numbers keys up to {MOST_KEYS}"
    return refusal()


def refuse(call: Call) -> str | None:
    """Why the native form cannot serve a call, or None."""
    if call.covariance_block is not None and call.covariance_block < call.q.shape[3]:
        return "it solves with whole covariances"
    if call.block_size:
        return "its tiles have one size, nothing to do with block_size"
    return unavailable(call.q, call.k)


def solves_directly(call: Call) -> bool:
    """Whether the solve is direct: under "auto" by metadata and the number a ridge is."""
    if call.solver != "auto":
        return call.solver == "direct"
    ridge = 1.0 if isinstance(call.ridge, Tensor) else float(call.ridge)
    if call.ridge_mode == "absolute":
        ridge /= EVIDENCE
    table = _DIRECT_UP_TO if call.q.dtype == torch.float32 else _DIRECT_UP_TO_WITH_HALF
    return any(size >= call.q.shape[3] and ridge <= largest for size, largest in table)


def serve(call: Call) -> Answer:
    """The answer of a call that was not refused."""
    direct = solves_directly(call)
    if call.kernel == "dot" and decode.serves(call.q, call.k) and decode.untraced(call):
        return decode.decode(call, direct)
    op = local_linear_native_kept_fwd if _keeps(call, direct) else local_linear_native_fwd
    return run(op, call, direct)


def _keeps(call: Call, direct: bool) -> bool:
    """Whether there are factors to keep, and a backward for which."""
    solved = direct and call.probe is None and not call.average
    small = call.q.shape[3] <= MOST_KEPT_CHANNELS and not decode.serves(call.q, call.k)
    return solved and small and decode.needs_gradient(call)
