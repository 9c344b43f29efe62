"""One call of the engine: its arguments, and the operands and options of the registered ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.decay import DecaySums, decay_sums
from regard.core.precision import compute_dtype
from regard.ops.local_linear.kernel import as_dot
from regard.ops.local_linear.solve import prefers_direct

OP = "local_linear_attention"
RIDGE_MODES = ("relative", "absolute")
SOLVERS = ("auto", "direct", "cg")
KERNELS = ("dot", "gaussian")
GRADIENTS = ("exact", "official")
PRECISIONS = ("auto", "high", "fast")
SINGLE = "single"  # one more that a form may choose: float32 operands for 16-bit inputs
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1.5e-3, torch.float16: 3e-4}


class LocalLinearAux(NamedTuple):
    """What a call can tell beside its output; none of it carries gradients.

    Fields:
        lse: log of the sum of exp(score) over the keys each query sees [B, H, T].
        slope: g = (C + lambda I)^-1 (kbar - q) [B, H, T, D]; the weights are
            p_j (1 - g . (k_j - kbar)).
        iterations: of the solver, for each query (int32 [B, H, T]).
        residual: the relative residual at which it stopped [B, H, T].
    """

    lse: Tensor
    slope: Tensor
    iterations: Tensor
    residual: Tensor


def backward_tolerance(tol: float) -> float:
    """What the backward solves to, unless told otherwise: tol / 100.

    Gradients of ridge, scale and decay are small sums of large terms. With tol / 10 their error
    was measured to be 30 times that of the output, with tol / 100 at most 7 times. Below 1e-13
    nothing is gained even in float64.
    """
    return min(tol, max(tol / 100, 1e-13))


@dataclass(frozen=True)
class Call:
    """One call, checked; without `decay` and `past` before a form is chosen."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    ridge: float | Tensor
    ridge_mode: str
    scale: float | Tensor | None
    key_mask: Tensor | None
    key_bias: Tensor | None
    log_decay: Tensor | None
    window: tuple[int, int] | None
    tol: float
    tol_backward: float
    solver: str = "auto"
    kernel: str = "dot"
    intercept: bool = True
    covariance_block: int | None = None
    grad: str = "exact"
    max_iters: int = 0  # 0: 2 D + 8
    block_size: int = 0  # 0: by the sizes
    stateful: bool = False
    decay: DecaySums | None = None
    row_bias: Tensor | None = None  # beside the scores, of the Gaussian kernel
    probe: Tensor | None = None  # g where it is given, as in Parallax
    average: bool = False  # g = 0, as in softmax attention
    precision: str = "auto"  # of the operands of products on a GPU
    given: tuple[str, ...] = ()  # the options of the compiled forms that the caller set


Answer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # out, lse, slope, iterations, residual


def operands(call: Call) -> tuple[Any, ...]:
    """The tensors of the registered op."""
    q, dtype, decay = call.q, compute_dtype(call.q.dtype), call.decay
    if decay is None and call.log_decay is not None:
        decay = decay_sums(call.log_decay, call.key_mask)
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(1, -1)
    else:
        scale = torch.full((1, 1), float(scale), dtype=dtype, device=q.device)
    sums, first = decay if decay is not None else (None, None)
    ridge = ridge_rows(call, dtype)
    return (
        q, call.k, call.v, ridge, scale, call.key_mask, call.key_bias, sums, first,
        call.row_bias, call.probe,
    )


def takes_direct(call: Call) -> bool:
    """Whether the eager solve is direct: under "auto" by metadata and the number a ridge is."""
    if call.covariance_block is not None:
        return True
    if call.solver != "auto":
        return call.solver == "direct"
    ridge = 1.0 if isinstance(call.ridge, Tensor) else float(call.ridge)
    _, H, T, D = call.q.shape
    sizes = (T * (H // call.k.shape[1]), call.k.shape[2], D)
    return prefers_direct(call.q.dtype, sizes, ridge, call.ridge_mode == "absolute")


def options(call: Call, direct: bool | None = None) -> tuple[Any, ...]:
    """The options of the registered op; `direct=None`: as the eager form would solve."""
    direct = takes_direct(call) if direct is None else direct
    left, right = call.window if call.window is not None else (-1, -1)
    return (
        call.causal, left, right, call.ridge_mode == "absolute", call.intercept,
        call.grad == "official", call.covariance_block or 0, call.average, direct,
        call.tol, call.tol_backward, call.max_iters, call.block_size, call.precision,
    )


def run(op: Callable[..., tuple[Tensor, ...]], call: Call, direct: bool | None = None) -> Answer:
    """A registered op on a call: a Gaussian kernel becomes a dot product with biases first."""
    dot = as_dot(call) if call.kernel == "gaussian" else call
    # The options are those of the call: float32 copies of 16-bit inputs do not change the solver.
    out, slope, lse, iterations, residual, *_ = op(*operands(dot), *options(call, direct))
    return out.to(call.q.dtype), lse, slope, iterations, residual


def ridge_rows(call: Call, dtype: torch.dtype) -> Tensor:
    """The ridge as [B | 1, H | 1, T | 1]."""
    ridge, heads = call.ridge, call.q.shape[1]
    if not isinstance(ridge, Tensor):
        return torch.full((1, 1, 1), float(ridge), dtype=dtype, device=call.q.device)
    ridge = ridge.to(dtype)
    if ridge.dim() < 2:
        return ridge.reshape(1, -1, 1)
    if ridge.shape[1] not in (1, heads):
        ridge = ridge.repeat_interleave(heads // ridge.shape[1], 1)
    return ridge
