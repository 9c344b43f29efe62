"""The kernels of the forward, as the table launches them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from regard.core.decay import decay_sums
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options


def inputs_of(
    D: int, dtype: torch.dtype, every: bool = False, masked: bool = False, **options: Any
) -> Inputs:
    """Causal self-attention of 256 tokens, with a key mask or every operand if asked for."""
    B, H, T = 1, 16, 256
    x = torch.zeros(B, H, T, D, dtype=dtype)
    given: dict[str, Any] = {"key_mask": None, "key_bias": None, "decay": None}
    if masked:
        given["key_mask"] = torch.ones(B, T, dtype=torch.bool)
    if every:
        given = {
            "key_mask": torch.ones(B, T, dtype=torch.bool),
            "key_bias": torch.zeros(B, H, T), "decay": decay_sums(torch.zeros(B, H, T)),
        }  # fmt: skip
    one = torch.ones(1, 1, 1)
    return Inputs(
        x, x, x, one, one[0], causal=True, window=(-1, -1), absolute=False, **given, **options
    )


def _forward(
    D: int, dtype: torch.dtype, precision: str = "auto", probe: bool = False, **options: Any
) -> None:
    from regard.ops.local_linear.triton.launch import forward

    inputs = inputs_of(D, dtype, **options)
    if probe:
        inputs = inputs_of(D, dtype, probe=inputs.q.float(), **options)
    forward(inputs, Options(D <= 16, 2e-3, 2e-5, 0, 0, precision))


BF16, FP32 = torch.bfloat16, torch.float32
SUBJECTS: dict[str, Callable[[], Any]] = {
    "local_linear forward D=16 bfloat16": partial(_forward, 16, BF16),
    "local_linear forward D=64 bfloat16": partial(_forward, 64, BF16),
    "local_linear forward D=64 bfloat16 every operand": partial(_forward, 64, BF16, every=True),
    "local_linear forward D=64 bfloat16 masked": partial(_forward, 64, BF16, masked=True),
    "local_linear forward D=64 float32": partial(_forward, 64, FP32),
    "local_linear forward D=128 bfloat16": partial(_forward, 128, BF16),
    "local_linear forward D=128 bfloat16 high": partial(_forward, 128, BF16, "high"),
    "softmax forward D=64 bfloat16": partial(_forward, 64, BF16, average=True),
    "softmax forward D=128 bfloat16": partial(_forward, 128, BF16, average=True),
    "parallax forward D=64 bfloat16": partial(_forward, 64, BF16, probe=True),
    "parallax forward D=128 bfloat16": partial(_forward, 128, BF16, probe=True),
}
