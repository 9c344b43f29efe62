"""Softmax attention by the tiles of local linear attention in plain C, which take g = 0 for it."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.native import chosen
from regard.ops.local_linear import native
from regard.ops.softmax.call import Call, Problem

# Where it was measured to be faster than torch's kernel, forward and backward together: on
# these instruction sets (0.4 times its time with the first, 0.8 with the second) from these sizes.
FASTER_WITH = ("avx512", "avx2")
FEWEST = 128  # queries, and keys
LEAST_WORK = 1 << 25  # B H T S D


def refuse(call: Call) -> str | None:
    """Why the C form cannot serve a call, or None."""
    q = call.q
    for name in ("bias", "softcap", "sinks", "block_size"):
        if getattr(call, name) is not None:
            return f"the C kernel has no {name}"
    if call.return_aux:
        return "its log-sum-exp carries no gradient"
    return native.unavailable(q, call.k)


def faster(call: Call) -> bool:
    """Whether torch's kernel, where it serves, takes longer."""
    B, H, T, D = call.q.shape
    S = call.k.shape[2] + (call.state.length if call.state is not None else 0)
    large = min(T, S) >= FEWEST and B * H * T * S * D >= LEAST_WORK
    return large and chosen() in FASTER_WITH


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
    out, *_ = native.local_linear_native_fwd(
        *operands, sees.causal, left, right, False, True, False, 0, True, False, 0.0, 0.0, 0, 0,
        "auto",
    )
    return out, None
