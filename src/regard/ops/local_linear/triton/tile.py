"""What every kernel of the engine does with a tile of queries x keys: ranges, masks, scores.

All of it runs inside kernels. Scores are in bits (base 2): exp2 is the instruction there is.

    s_ij = (q'_i . k'_j) factor_i + bias_j + decay_ij,      p_ij = exp2(s_ij - top_i) / total_i

q', k' are what `prepare` makes of queries and keys; a hidden key has s = -inf. Functions take
rows and columns already expanded, [M, 1] and [1, N], or [1, M] and [N, 1] where keys are rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def queries_seeing(
    j0, T, S, left, right,
    M: tl.constexpr, N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):
    """Queries [low, high) that see any of keys [j0, j0 + N); [whole, high) see all of them.

    low and whole are multiples of M; the last tile may stick out of T, where p must be 0.
    """
    at = j0 - (S - T)
    low = 0
    high = T
    whole = 0
    if HAS_RIGHT:
        low = tl.minimum(tl.maximum(at - right, 0), T) // M * M
        whole = (tl.maximum(at + N - 1 - right, 0) + M - 1) // M * M
    if HAS_LEFT:
        high = tl.minimum(tl.maximum(at + N + left, 0), T)
    if HAS_LEFT:
        whole = high
    return low, tl.minimum(tl.maximum(whole, low), high), high


@triton.jit
def visible(
    position, key, first, S, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DECAY: tl.constexpr,
):
    """Whether queries at key positions `position` see keys `key`; `first` is where a decay forgets.

    Masked keys are not known here: their bias is -inf.
    """
    # Two limits per query, so that there are two comparisons per pair at most.
    after = position * 0 + S
    if HAS_RIGHT:
        after = tl.minimum(position + right + 1, S)
    seen = key < after
    if HAS_LEFT:
        before = position - left
        if HAS_DECAY:
            before = tl.maximum(before, first)
        seen &= key >= before
    elif HAS_DECAY:
        seen &= key >= first
    return seen


@triton.jit
def scores(
    product, factor, bias, row_high, row_low, high, low,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr,
):
    """Scores in bits of a tile without its mask; a decay is a difference of two-float sums."""
    s = product * factor
    if HAS_BIAS:
        s += bias
    if HAS_DECAY:
        s += (row_high - high) + (row_low - low)
    return s


@triton.jit
def split(x, dtype: tl.constexpr):
    """x as the sum of two numbers of a shorter type."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)
