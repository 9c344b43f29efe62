"""Softmax attention as a call of the engine of local linear attention, which takes g = 0 for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.ops.softmax.call import Call, Problem

WITHOUT = ("bias", "softcap", "sinks", "block_size")  # what the engine's kernels do not have


def refuse(call: Call) -> str | None:
    """Why no kernel of the engine can serve a call, or None."""
    for name in WITHOUT:
        if getattr(call, name) is not None:
            return f"its kernels have no {name}"
    return "its log-sum-exp carries no gradient" if call.return_aux else None


def attend(op: Callable[..., tuple[Tensor, ...]], problem: Problem) -> Tensor:
    """Output [B, H, T, Dv] of a registered op of the engine."""
    q, sees, scale = problem.q, problem.sees, problem.scale
    dtype = compute_dtype(q.dtype)
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(1, -1)
    else:
        scale = torch.full((1, 1), float(scale), dtype=dtype, device=q.device)
    sums, first = sees.decay if sees.decay is not None else (None, None)
    left, right = sees.window if sees.window is not None else (-1, -1)
    ridge = torch.ones((1, 1, 1), dtype=dtype, device=q.device)
    out, *_ = op(
        q, problem.k, problem.v, ridge, scale, sees.key_mask, sees.key_bias, sums, first, None,
        None, sees.causal, left, right, False, True, False, 0, True, False, 0.0, 0.0, 0, 0,
        "auto",
    )  # fmt: skip
    return out
