"""The kernels of the linear engine, as the table launches them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

BF16, FP32 = torch.bfloat16, torch.float32
HEADS, T = 16, 1024


def _call(
    D: int,
    dtype: torch.dtype,
    feature: str = "identity",
    decay: bool = True,
    normalised: bool = False,
    mask: bool = False,
    causal: bool = True,
    tokens: int = T,
    backward: bool = False,
    maps: tuple[bool, bool] = (False, False),
) -> None:
    from regard.ops.linear.triton import gradient, launch
    from regard.ops.linear.triton.table import MAPS

    x = torch.zeros(1, HEADS, tokens, D, dtype=dtype)
    steps = torch.zeros(1, HEADS, tokens) if decay else None
    real = torch.ones(1, tokens, dtype=torch.bool) if mask else None
    F = 2 * D if MAPS[feature].two else D
    state = torch.zeros(1, HEADS, F, D)
    total = torch.zeros(1, HEADS, F) if normalised else None
    least = -torch.inf
    options = launch.Options(causal, feature, feature, 1.0, normalised, least, 0.0, True)
    q, k = (torch.zeros(HEADS, D, D, dtype=dtype) if wanted else None for wanted in maps)
    results = launch.forward(x, x, x, steps, real, state, total, options, (q, k))
    if backward:
        out, end, end_total, *kept = results
        mapped = x.float() if any(maps) else x
        given = gradient.Kept(mapped, mapped, x, steps, real, state, total, out, *kept)
        gradient.backward(x, end, end_total, given, options, decay, True)


SUBJECTS: dict[str, Callable[[], Any]] = {
    "linear D=64 bfloat16": partial(_call, 64, BF16, backward=True),
    "linear D=64 float32": partial(_call, 64, FP32, backward=True),
    "linear D=128 bfloat16": partial(_call, 128, BF16, backward=True),
    "linear elu D=64 bfloat16 noncausal": partial(
        _call, 64, BF16, "elu", normalised=True, mask=True, causal=False, backward=True
    ),
    "linear hedgehog D=64 bfloat16": partial(
        _call, 64, BF16, "hedgehog:softmax_dim", decay=False, normalised=True, backward=True
    ),
    "linear hedgehog D=128 bfloat16": partial(
        _call, 128, BF16, "hedgehog:softmax_dim", decay=False, normalised=True
    ),
    "linear learned hedgehog D=64 bfloat16": partial(
        _call, 64, BF16, "hedgehog:softmax_dim", False, True, backward=True, maps=(True, True)
    ),
    "linear learned hedgehog D=128 bfloat16": partial(
        _call, 128, BF16, "hedgehog:softmax_dim", False, True, maps=(True, False)
    ),
    "linear decode D=64 bfloat16": partial(_call, 64, BF16, tokens=1),
}
