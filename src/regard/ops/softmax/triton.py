"""Softmax attention by the Triton kernels of local linear attention, which take g = 0 for it."""

from __future__ import annotations

from torch import Tensor

from regard import gpu
from regard.ops.local_linear import triton
from regard.ops.softmax import engine
from regard.ops.softmax.call import Call, Problem


def refuse(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q, v = call.q, call.v
    reason = engine.refuse(call)
    if reason is None:
        reason = gpu.refusal(q.device, q.dtype)
    if reason is not None:
        return reason
    widest = max(q.shape[3], v.shape[3])
    if widest > triton.WIDEST:
        return f"its heads have at most {triton.WIDEST} channels, not {widest}"
    return None


def refuse_unverified(call: Call) -> str | None:
    """The same where nobody asked for the kernels: only what was run on such a device."""
    reason = refuse(call)
    if reason is not None:
        return reason
    widest = max(call.q.shape[3], call.v.shape[3])
    return gpu.unverified("local_linear", call.q.device, call.q.dtype, widest)


def attend(problem: Problem) -> tuple[Tensor, None]:
    """Output [B, H, T, Dv]."""
    return engine.attend(triton.local_linear_triton_fwd, problem), None
