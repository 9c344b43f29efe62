"""The kernels of block-sparse attention, as the table launches them."""

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
    block: int = 128,
    kind: str = "levels",
    causal: bool = False,
    bias: bool = False,
    tokens: int = T,
    key_heads: int = HEADS,
    backward: bool = True,
) -> None:
    from regard.ops.block_sparse.triton import launch

    q = torch.zeros(1, HEADS, tokens, D, dtype=dtype)
    x = torch.zeros(1, key_heads, T, D, dtype=dtype)
    added = torch.zeros(1, 1, T) if bias else None
    plan = torch.ones(1, HEADS, -(-tokens // block), -(-T // block), dtype=torch.int8)
    left = 128 if kind == "window" else -1
    block_q = block
    if kind == "window":
        plan = None
    elif kind == "indices":
        plan, block_q = torch.zeros(1, key_heads, tokens, 8, dtype=torch.int32), 1
    settings = launch.Settings(
        kind == "indices", block_q, block, left, 0 if causal else -1, D**-0.5
    )
    out, lse = launch.forward(q, x, x, added, plan, None, settings)
    if backward:
        launch.backward(q, out, lse, q, x, x, added, plan, None, settings, bias)


SUBJECTS: dict[str, Callable[[], Any]] = {
    "block sparse D=64 bfloat16": partial(_call, 64, BF16),
    "block sparse D=128 bfloat16": partial(_call, 128, BF16),
    "block sparse D=64 bfloat16 causal, biases": partial(
        _call, 64, BF16, 64, causal=True, bias=True
    ),
    "block sparse D=64 float32": partial(_call, 64, FP32, causal=True),
    "block sparse D=64 bfloat16 window": partial(_call, 64, BF16, kind="window", causal=True),
    "block sparse D=128 bfloat16 window": partial(_call, 128, BF16, kind="window", causal=True),
    "block sparse D=64 bfloat16 indices": partial(
        _call, 64, BF16, 64, "indices", causal=True, key_heads=4
    ),
    "block sparse D=128 bfloat16 decode": partial(
        _call, 128, BF16, 64, tokens=1, causal=True, backward=False
    ),
}
