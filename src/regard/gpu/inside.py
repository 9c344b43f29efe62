"""Functions that kernels of several mechanisms call. Importing this imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(x):
    """The largest power of two that is at most x (normal, positive); 1 for 0, inf and NaN."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    usual = (exponent > 0) & (exponent < 0x7F800000)
    return tl.where(usual, exponent, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def head_of(pair, H: tl.constexpr, HEADS: tl.constexpr):
    """The row of an operand [B * HEADS, .] (HEADS 1, Hk or H) that pair b * H + h reads."""
    return pair // H * HEADS + pair % H * HEADS // H
