"""What kernels share: rows of blocks, positions, who sees what. All of it runs inside kernels.

A list (`lists.py`) names blocks. Where the rows of a block fill whole tiles, a tile is a stretch
of one block; otherwise it is gathered from as many blocks as it takes.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_at(source, start, stride, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Rows [start, start + ROWS) of x [., D] as [ROWS, DP], 0 beyond D; all rows are there."""
    channels = tl.arange(0, DP)
    base = source + tl.cast(start, tl.int64) * stride
    places = base + tl.arange(0, ROWS)[:, None] * stride + channels[None, :]
    inside = (channels < D)[None, :]
    return tl.load(places) if D == DP else tl.load(places, mask=inside, other=0.0)


@triton.jit
def rows_at(source, places, there, D: tl.constexpr, DP: tl.constexpr):
    """Rows that begin at `places` of x as [., DP]; 0 where they are not there, and beyond D."""
    channels = tl.arange(0, DP)
    known = there[:, None]
    if D != DP:
        known = known & (channels < D)[None, :]
    return tl.load(source + places[:, None] + channels[None, :], mask=known, other=0.0)


@triton.jit
def plan_head(
    b, h, kv, SHARE: tl.constexpr, PH: tl.constexpr, H: tl.constexpr, HK: tl.constexpr
):  # fmt: skip
    """The head of a plan [., PH, ..] that query head h on key head kv of batch row b follows.

    SHARE batch rows, neighbours, have one plan.
    """
    row = h
    if PH == 1:
        row = h * 0
    elif PH == HK:
        row = kv
    return row + b // SHARE * PH


@triton.jit
def positions_of(i, T, S, BLOCK_Q: tl.constexpr):
    """The key positions of the first and the last query of block i."""
    low = i * BLOCK_Q + (S - T)
    high = tl.minimum((i + 1) * BLOCK_Q, T) - 1 + (S - T)
    return low, high


@triton.jit
def keys_in_reach(
    i, T, S, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Blocks [first, stop) of keys that block i of queries sees; [whole, cut) it sees wholly."""
    low, high = positions_of(i, T, S, BLOCK_Q)
    first = i * 0
    whole = first
    stop = tl.cdiv(S, BLOCK_K)
    cut = S // BLOCK_K
    if HAS_LEFT:
        first = tl.maximum(low - left, 0) // BLOCK_K
        whole = tl.cdiv(tl.maximum(high - left, 0), BLOCK_K)
    if HAS_RIGHT:
        stop = tl.cdiv(tl.minimum(S, tl.maximum(high + right + 1, 0)), BLOCK_K)
        cut = tl.minimum(S, tl.maximum(low + right + 1, 0)) // BLOCK_K
    return _ordered(first, whole, cut, stop)


@triton.jit
def queries_in_reach(
    j, T, S, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Blocks [first, stop) of queries that see block j of keys; [whole, cut) see it wholly."""
    start = j * BLOCK_K - (S - T)  # as indices of queries
    end = tl.minimum((j + 1) * BLOCK_K, S) - 1 - (S - T)
    first = j * 0
    whole = first
    stop = tl.cdiv(T, BLOCK_Q)
    cut = T // BLOCK_Q
    if HAS_RIGHT:
        first = tl.maximum(start - right, 0) // BLOCK_Q
        whole = tl.cdiv(tl.maximum(end - right, 0), BLOCK_Q)
    if HAS_LEFT:
        stop = tl.cdiv(tl.minimum(T, tl.maximum(end + left + 1, 0)), BLOCK_Q)
        cut = tl.minimum(T, tl.maximum(start + left + 1, 0)) // BLOCK_Q
    return _ordered(first, whole, cut, stop)


@triton.jit
def _ordered(first, whole, cut, stop):
    stop = tl.maximum(first, stop)
    whole = tl.minimum(tl.maximum(whole, first), stop)
    cut = tl.minimum(tl.maximum(cut, whole), stop)
    return first, whole, cut, stop


@triton.jit
def visible(
    first, last, position, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):  # fmt: skip
    """Whether queries at `position` see rows of tokens [first, last], by position."""
    seen = last < position * 0 + 0x7FFFFFFF
    if HAS_RIGHT:
        seen = seen & (last <= position + right)
    if HAS_LEFT:
        seen = seen & (first >= position - left)
    return seen


@triton.jit
def first_pooled_row(level, S):
    """Where rows of a level begin among the pooled ones."""
    two = tl.cdiv(S, 2)
    start = tl.where(level == 2, 0, two)
    return start + tl.where(level == 8, tl.cdiv(S, 4), 0)


@triton.jit
def weight_of_group(level, first, S):
    """log2 of how many tokens a pooled row that begins at token `first` stands for."""
    return tl.log2(tl.maximum(tl.minimum(level, S - first), 1).to(tl.float32))
