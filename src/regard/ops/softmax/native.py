"""Softmax attention by the tiles of local linear attention in plain C, which take g = 0 for it."""

from __future__ import annotations

from torch import Tensor

from regard.native import chosen
from regard.ops.local_linear import native
from regard.ops.softmax import engine
from regard.ops.softmax.call import Call, Problem

# Where it was measured to be faster than torch's kernel, forward and backward together: on
# these instruction sets (0.4 times its time with the first, 0.8 with the second) from these sizes.
FASTER_WITH = ("avx512", "avx2")
FEWEST = 128  # queries, and keys
LEAST_WORK = 1 << 25  # B H T S D


def refuse(call: Call) -> str | None:
    """Why the C form cannot serve a call, or None."""
    reason = engine.refuse(call)
    return native.unavailable(call.q, call.k) if reason is None else reason


def faster(call: Call) -> bool:
    """Whether torch's kernel, where it serves, takes longer."""
    B, H, T, D = call.q.shape
    S = call.k.shape[2] + (call.state.length if call.state is not None else 0)
    large = min(T, S) >= FEWEST and B * H * T * S * D >= LEAST_WORK
    return large and chosen() in FASTER_WITH


def attend(problem: Problem) -> tuple[Tensor, None]:
    """Output [B, H, T, Dv]."""
    return engine.attend(native.local_linear_native_fwd, problem), None
