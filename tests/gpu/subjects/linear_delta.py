"""The kernels of the delta rule and of Mesa, as the tables launch them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def operands(D: int, dtype: torch.dtype, T: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [1, 16, T, D], one number for each, and a state."""
    return torch.zeros(1, 16, T, D, dtype=dtype), torch.zeros(1, 16, T), torch.zeros(1, 16, D, D)


def _delta(D: int, dtype: torch.dtype, T: int = 256) -> None:
    from regard.ops.linear.triton_delta.launch import forward

    x, strength, state = operands(D, dtype, T)
    forward(x, x, x, strength, strength, state, 0.125, True)


def _delta_backward(D: int, dtype: torch.dtype) -> None:
    from regard.ops.linear.triton_delta.launch import backward

    x, strength, state = operands(D, dtype)
    backward(x, state, x, x, x, strength, strength, state, 0.125, True, True)


def _mesa(D: int, dtype: torch.dtype) -> None:
    from regard.ops.mesa.triton.launch import forward

    x, strength, state = operands(D, dtype)
    forward(x, x, x, strength, strength, state, state, torch.ones(1, 16, D), 1e-2, 0)


def _mesa_backward(D: int, dtype: torch.dtype) -> None:
    from regard.ops.mesa.triton.launch import solve

    x, strength, _ = operands(D, dtype)
    solve(x.float(), x, strength, strength, None, torch.ones(1, 16, D), 1e-3, 0)


BF16, FP32 = torch.bfloat16, torch.float32
SUBJECTS: dict[str, Callable[[], Any]] = {
    "delta forward D=64 bfloat16": partial(_delta, 64, BF16),
    "delta forward D=64 float32": partial(_delta, 64, FP32),
    "delta forward D=128 bfloat16": partial(_delta, 128, BF16),
    "delta decode D=64 bfloat16": partial(_delta, 64, BF16, 1),
    "delta backward D=64 bfloat16": partial(_delta_backward, 64, BF16),
    "delta backward D=128 bfloat16": partial(_delta_backward, 128, BF16),
    "mesa forward D=64 bfloat16": partial(_mesa, 64, BF16),
    "mesa forward D=128 bfloat16": partial(_mesa, 128, BF16),
    "mesa backward D=64 bfloat16": partial(_mesa_backward, 64, BF16),
}
