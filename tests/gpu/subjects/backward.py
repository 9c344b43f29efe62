"""The kernels of the backward, as the table launches them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu.subjects.forward import inputs_of
from regard.ops.local_linear.backward import Wanted
from regard.ops.local_linear.registered import Options


def _backward(
    D: int, dtype: torch.dtype, probe: bool = False, refined: bool = False, **options: Any
) -> None:
    from regard.ops.local_linear.triton.gradient import backward

    inputs = inputs_of(D, dtype, **options)
    if probe:
        inputs = inputs_of(D, dtype, probe=inputs.q.float(), **options)
    bias, decay = inputs.key_bias is not None, inputs.decay is not None
    solved = not (probe or inputs.average)
    wanted = Wanted(True, True, True, solved, False, bias, decay, False, probe)
    lse, slope = torch.zeros(inputs.q.shape[:3]), torch.zeros(inputs.q.shape)
    mean = slope if solved else slope.new_zeros(1, 0)
    tolerances = (1e-2, 1e-3) if refined else (2e-3, 1e-3)
    saved = (inputs.q, slope, lse, (lse, lse, mean), wanted)
    backward(inputs, Options(False, *tolerances, 0, 0, "auto"), *saved)


BF16, FP32 = torch.bfloat16, torch.float32
SUBJECTS: dict[str, Callable[[], Any]] = {
    "local_linear backward D=16 bfloat16": partial(_backward, 16, BF16),
    "local_linear backward D=64 bfloat16": partial(_backward, 64, BF16),
    "local_linear backward D=64 bfloat16 refined": partial(_backward, 64, BF16, refined=True),
    "local_linear backward D=64 bfloat16 every operand": partial(_backward, 64, BF16, every=True),
    "local_linear backward D=64 float32": partial(_backward, 64, FP32),
    "local_linear backward D=128 bfloat16": partial(_backward, 128, BF16),
    "softmax backward D=64 bfloat16": partial(_backward, 64, BF16, average=True),
    "parallax backward D=64 bfloat16": partial(_backward, 64, BF16, probe=True),
    "parallax backward D=128 bfloat16": partial(_backward, 128, BF16, probe=True),
}
