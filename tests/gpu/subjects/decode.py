"""Decoding kernels, as the table launches them for a long cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from regard.core.decay import decay_sums
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options

OPTIONS = Options(True, 2e-3, 2e-5, 0, 0, "auto")


def inputs_of(
    D: int, dtype: torch.dtype, *, every: bool = False, S: int = 4096, **options: Any
) -> Inputs:
    """One query of 16 heads against a cache of zeros; with every operand if asked for."""
    q = torch.zeros(1, 16, 1, D, dtype=dtype)
    k = torch.zeros(1, 1, 1, D, dtype=dtype).expand(1, 16, S, D)
    given: dict[str, Any] = {"key_mask": None, "key_bias": None, "decay": None}
    if every:
        given = {
            "key_mask": torch.ones(1, S, dtype=torch.bool),
            "key_bias": torch.zeros(1, 16, S), "decay": decay_sums(torch.zeros(1, 16, S)),
        }  # fmt: skip
    one = torch.ones(1, 1, 1)
    return Inputs(
        q, k, k, one, one[0], causal=True, window=(-1, -1), absolute=False, **given, **options
    )


def _decode(D: int, dtype: torch.dtype, probe: bool = False, **options: Any) -> None:
    from regard.ops.local_linear.triton.decode import decode

    inputs = inputs_of(D, dtype, **options)
    if probe:
        inputs = inputs_of(D, dtype, probe=inputs.q.float(), **options)
    decode(inputs, OPTIONS)


BF16, FP32 = torch.bfloat16, torch.float32
SUBJECTS: dict[str, Callable[[], Any]] = {
    "local_linear decode D=16 bfloat16": partial(_decode, 16, BF16),
    "local_linear decode D=64 bfloat16": partial(_decode, 64, BF16),
    "local_linear decode D=64 bfloat16 every operand": partial(_decode, 64, BF16, every=True),
    "local_linear decode D=64 float32": partial(_decode, 64, FP32),
    "local_linear decode D=128 bfloat16": partial(_decode, 128, BF16),
    "local_linear decode D=128 float32": partial(_decode, 128, FP32),
    "softmax decode D=128 bfloat16": partial(_decode, 128, BF16, average=True),
    "parallax decode D=64 bfloat16 every operand": partial(
        _decode, 64, BF16, probe=True, every=True
    ),
}
