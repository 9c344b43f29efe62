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
from regard.ops.local_linear.call import Answer, Call, run
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Extra, Options, register

NAME = "local_linear_triton"
WIDEST = 128  # channels of a head
# Head sizes that are solved directly: as cheap as a few steps, and as good for any keys.
DIRECT_UP_TO = 16
RIGHT_IN_SINGLE = 33, 64  # channels: where gradients with float32 operands were right on an H100
GIVEN_UP_TO = 64  # channels: where gradients with a slope that is given (Parallax) were right there
FAST = 1e-2  # tolerance of precision="fast"


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
    return refuse_gradients(call)


def refuse_gradients(call: Any) -> str | None:
    """Why a call (with its operands as attributes, q among them) has no gradients here, or None.

    With operands in float32 (and the Gaussian kernel has them for any inputs), Triton 3.6
    compiles some tiles of the key-major kernel for an H100 to wrong products and to reads outside
    of shared memory, which the interpreter does not show. In wide heads the same kernel left
    gradients of keys and values at zero where the slope is given. What was right on the device
    may run.
    """
    single = call.q.dtype == torch.float32 or getattr(call, "kernel", "dot") != "dot"
    given = getattr(call, "probe", None) is not None
    if not (single or given) or gpu.interpreting() or not torch.is_grad_enabled():
        return None
    least, most = RIGHT_IN_SINGLE if single else (1, GIVEN_UP_TO)
    if least <= max(call.q.shape[3], call.v.shape[3]) <= most:
        return None
    # By the fields' names: vars() cannot be traced by torch.compile.
    operands = (getattr(call, field) for field in type(call).__dataclass_fields__)
    if any(isinstance(x, Tensor) and x.requires_grad for x in operands):
        if not single:
            return f"gradients with a slope that is given need at most {most} channels"
        return f"with operands in float32 its gradients need {least} to {most} channels"
    return None


def _refuse_unverified(call: Call) -> str | None:
    reason = refuse(call)
    if reason is not None:
        return reason
    size = max(call.q.shape[3], call.v.shape[3])
    return gpu.unverified("local_linear", call.q.device, call.q.dtype, size)


def tolerances(call: Call) -> tuple[float, float]:
    """Of the forward and of the backward: those of the call where it gives them.

    With 16-bit operands a second solve gains little beyond a quarter of the first's tolerance
    (measured); a tenth takes g up again where the forward had left it.
    """
    tol, backward = call.tol, call.tol_backward
    if call.q.dtype == torch.float32:
        return tol, backward
    if call.precision == "fast" and "tol" not in call.given:
        tol = FAST
    if "tol_backward" not in call.given:
        backward = tol / {"fast": 1, "auto": 4, "high": 10}[call.precision]
    return tol, backward


def serve(call: Call) -> Answer:
    """The answer of the kernels."""
    small = call.q.shape[3] <= DIRECT_UP_TO and call.solver != "cg"
    tol, backward = tolerances(call)
    call = replace(call, tol=tol, tol_backward=backward)
    return run(local_linear_triton_fwd, call, direct=small and call.q.dtype != torch.float32)


FORMS: tuple[Form, ...] = (
    Form("triton", "triton", _refuse_unverified, serve),
    Form("triton", "triton unverified", refuse, serve, auto=False),
)


