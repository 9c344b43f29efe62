"""The Triton form of the engine: which calls it serves, and its registered operators.

Importing this needs no Triton and no GPU: kernels are loaded by the first call that runs one.
The files:

- `launch.py`: the forward, from operands to kernels and back; `gradient.py`: the backward
- `prepare.py`: what kernels read instead of keys and values; `table.py`: with which tiles they
  run; `regard.gpu.start`: how they are started
- `walk.py`, `tile.py`: what kernels share: where a program stands, what a tile's scores are
- `forward.py`, `conjugate.py`: mean key and output, and the solve between; `given.py`: both in one
  where g is given; `direct.py`, `direct_kernels.py`: small heads solved directly
- `rescue.py`: rows that failed, in float64
- `cotangent.py`, `of_queries.py`, `of_keys.py`: the three passes of the backward
- `decode.py`, `decode_kernels.py`, `average_kernels.py`: a few queries against a long cache
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard import gpu
from regard.core.dispatch import Form
from regard.ops.local_linear import backward as gradients
from regard.ops.local_linear.call import (
    SINGLE,
    TOLERANCE,
    Answer,
    Call,
    backward_tolerance,
    run,
)
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Extra, Options, register

NAME = "local_linear_triton"
WIDEST = 128  # channels of a head
# Head sizes that are solved directly: as cheap as a few steps, and as good for any keys.
DIRECT_UP_TO = 16
FAST = 1e-2  # tolerance of precision="fast"
# The matrix of a query that sees few keys is ill-conditioned, and the rounding of its operands does
# not average out. A call with 16-bit inputs is computed as with float32 ones, operands and
# tolerances, if none of its queries can see more keys than this, by position:
FEW_KEYS = {
    "singular": 256,  # an absolute ridge, no intercept, or so few channels that it was direct
    "float16": 128,
    "bfloat16": 0,  # below what rounding such inputs does (measured)
}
FEW_PAIRS = 2**16  # of queries and such keys in a head: more take longer than their launches


def run_forward(inputs: Inputs, options: Options) -> tuple[Tensor, ...]:
    """The results of the operator and what its backward needs."""
    from regard.ops.local_linear.triton import launch

    with _where(inputs):
        return launch.forward(inputs, options)


def run_backward(
    inputs: Inputs,
    options: Options,
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    extras: tuple[Tensor, ...],
    wanted: gradients.Wanted,
) -> tuple[Tensor, ...]:
    """Gradients in the order of `Wanted`."""
    from regard.ops.local_linear.triton import gradient

    with _where(inputs):
        return gradient.backward(inputs, options, grad, slope, lse, extras, wanted)


def _where(inputs: Inputs) -> AbstractContextManager[Any]:
    """Kernels start on the current device: that of the operands, then."""
    device = inputs.q.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _few(inputs: Inputs) -> bool:
    """Whether it is a step of decoding, which saves nothing for a backward."""
    from regard.ops.local_linear.triton import decode

    q, v = inputs.q, inputs.v
    empty = q.numel() == 0 or inputs.k.shape[2] == 0 or v.shape[3] == 0
    return not empty and decode.serves(inputs) is None


def _rows(inputs: Inputs) -> tuple[int, ...]:
    return (inputs.q.shape[0], 0) if _few(inputs) else tuple(inputs.q.shape[:3])


def _means(inputs: Inputs) -> tuple[int, ...]:
    solved = inputs.probe is None and not inputs.average
    return tuple(inputs.q.shape) if solved and not _few(inputs) else (inputs.q.shape[0], 0)


local_linear_triton_fwd = register(
    NAME,
    run_forward,
    run_backward,
    (Extra("top", _rows), Extra("total", _rows), Extra("mean", _means)),
)


def refuse(call: Call) -> str | None:
    """Why no kernel here can serve a call, from its metadata."""
    q, v = call.q, call.v
    reason = gpu.refusal(q.device, q.dtype)
    if reason is not None:
        return reason
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"its heads have at most {WIDEST} channels, not {max(q.shape[3], v.shape[3])}"
    if call.covariance_block is not None:
        return "it has no block-diagonal covariances"
    if call.solver == "direct" and q.shape[3] > DIRECT_UP_TO:
        return f"it solves directly up to a head size of {DIRECT_UP_TO} only"
    if "block_size" in call.given:
        return "the sizes of its tiles are fixed"
    return None


def _refuse_unverified(call: Call) -> str | None:
    reason = refuse(call)
    if reason is not None:
        return reason
    size = max(call.q.shape[3], call.v.shape[3])
    return gpu.unverified("local_linear", call.q.device, call.q.dtype, size)


def sees_few_keys(call: Call) -> bool:
    """Whether a call with 16-bit inputs is computed as float32 ones would be; see `FEW_KEYS`.

    By metadata of one sequence only.
    """
    solved = call.probe is None and not call.average
    if not solved or call.q.dtype == torch.float32 or call.precision == "fast":
        return False
    T, S, D = call.q.shape[2], call.k.shape[2], call.q.shape[3]
    left, right = call.window if call.window is not None else (-1, -1)
    right = 0 if call.causal else right
    keys = S
    if left >= 0:
        keys = min(S, left + (T if right < 0 else 1 + right))
    singular = call.ridge_mode == "absolute" or not call.intercept or D <= DIRECT_UP_TO
    kind = "float16" if call.q.dtype == torch.float16 else "bfloat16"
    most = FEW_KEYS["singular" if singular else kind]
    return keys <= most and T * keys <= FEW_PAIRS


def tolerances(call: Call) -> tuple[float, float]:
    """Of the forward and of the backward: those of the call where it gives them.

    With 16-bit operands a second solve gains little beyond a quarter of the first's tolerance
    (measured); a tenth takes g up again where the forward had left it.
    """
    tol, backward = call.tol, call.tol_backward
    if call.q.dtype == torch.float32:
        return tol, backward
    few = sees_few_keys(call)
    if "tol" not in call.given:
        tol = FAST if call.precision == "fast" else TOLERANCE[torch.float32] if few else tol
    if "tol_backward" not in call.given:
        part = {"fast": 1, "auto": 4, "high": 10}[call.precision]
        backward = backward_tolerance(tol) if few else tol / part
    return tol, backward


def serve(call: Call) -> Answer:
    """The answer of the kernels."""
    half = call.q.dtype != torch.float32
    tol, backward = tolerances(call)
    if sees_few_keys(call):
        half = False
        if call.solver == "direct":  # by steps, to what a direct solve gives
            tol = min(tol, TOLERANCE[torch.float32])
        call = replace(call, precision=SINGLE)
    small = call.q.shape[3] <= DIRECT_UP_TO and call.solver != "cg"
    call = replace(call, tol=tol, tol_backward=backward)
    return run(local_linear_triton_fwd, call, direct=small and half)


FORMS: tuple[Form, ...] = (
    Form("triton", "triton", _refuse_unverified, serve),
    Form("triton", "triton unverified", refuse, serve, auto=False),
)
