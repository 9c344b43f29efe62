"""Softmax attention by the Triton kernels of local linear attention, which take g = 0 for it."""

from __future__ import annotations

import torch
from torch import Tensor

from regard import gpu
from regard.core.precision import compute_dtype
from regard.ops.local_linear import triton
from regard.ops.softmax.call import Call, Problem


def refuse(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q, v = call.q, call.v
    for name in ("bias", "softcap", "sinks", "block_size"):
        if getattr(call, name) is not None:
            return f"the kernel has no {name}"
    if call.return_aux:
        return "its log-sum-exp carries no gradient"
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
    q, sees, scale = problem.q, problem.sees, problem.scale
    dtype = compute_dtype(q.dtype)
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(1, -1)
    else:
        scale = torch.full((1, 1), float(scale), dtype=dtype, device=q.device)
    sums, first = sees.decay if sees.decay is not None else (None, None)
    left, right = sees.window if sees.window is not None else (-1, -1)
    ridge = torch.ones((1, 1, 1), dtype=dtype, device=q.device)
    operands = (
        q, problem.k, problem.v, ridge, scale, sees.key_mask, sees.key_bias, sums, first, None,
        None,
    )  # fmt: skip
    out, *_ = triton.local_linear_triton_fwd(
        *operands, sees.causal, left, right, False, True, False, 0, True, False, 0.0, 0.0, 0, 0,
        "auto",
    )
    return out, None
