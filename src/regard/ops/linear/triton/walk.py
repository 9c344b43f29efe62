"""What the kernels share: tiles of rows, and the decays inside a chunk of tokens.

Positions run from 0 to max(T, S): queries and keys are aligned at their ends, so query i stands
at i + max(S - T, 0) and key j at j + max(T - S, 0). A chunk is C positions; a segment is several
chunks, walked over by one program.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# A step below this forgets: its exponential is 0 in float32 (and sums of it keep their digits).
FORGETS: tl.constexpr = tl.constexpr(-110.0)


@triton.jit
def tile(x, first, offset, count, stride, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
         column):  # fmt: skip
    """Rows at positions [first, first + C) of x [count, W], columns from `column`; 0 outside.

    Position p holds row p - offset.
    """
    start = first - offset
    rows = start + tl.arange(0, C)
    columns = column + tl.arange(0, WP)
    inside = ((rows >= 0) & (rows < count))[:, None]
    if W % WP != 0:
        inside = inside & (columns < W)[None, :]
    places = (tl.arange(0, C) * stride)[:, None] + columns[None, :]
    return tl.load(x + tl.cast(start, tl.int64) * stride + places, mask=inside, other=0.0)


@triton.jit
def put(x, first, offset, count, values, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
        column):  # fmt: skip
    """Writes what `tile` would read, to a contiguous x."""
    start = first - offset
    rows = start + tl.arange(0, C)
    columns = column + tl.arange(0, WP)
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < W)[None, :]
    places = (tl.arange(0, C) * W)[:, None] + columns[None, :]
    tl.store(x + tl.cast(start, tl.int64) * W + places, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def numbers(x, first, offset, count, stride, C: tl.constexpr):
    """Elements at positions [first, first + C) of x [count]; 0 outside."""
    rows = first - offset + tl.arange(0, C)
    return tl.load(x + rows.to(tl.int64) * stride, mask=(rows >= 0) & (rows < count), other=0)


@triton.jit
def put_numbers(x, first, offset, count, values, C: tl.constexpr):
    """Writes what `numbers` would read, to a contiguous x."""
    rows = first - offset + tl.arange(0, C)
    tl.store(x + rows, values, mask=(rows >= 0) & (rows < count))


@triton.jit
def real_keys(first, offset, S, mask, stride, C: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which positions [first, first + C) hold a key that is not masked."""
    rows = first - offset + tl.arange(0, C)
    real = (rows >= 0) & (rows < S)
    if HAS_MASK:
        real = real & (tl.load(mask + rows.to(tl.int64) * stride, mask=real, other=0) != 0)
    return real


@triton.jit
def steps(decay, first, offset, real, stride, C: tl.constexpr, SUMS: tl.constexpr):
    """Logarithms (base 2) of the decays since before the chunk, summed in SUMS; the whole.

    Float64 for operands in float32: of a difference of sums in float32, a step of -40 before it
    leaves 1e-5, which is nothing beside the rounding of 16-bit operands.
    """
    rows = first - offset + tl.arange(0, C)
    step = tl.load(decay + rows.to(tl.int64) * stride, mask=real, other=0.0).to(tl.float32)
    step = tl.maximum(step, FORGETS).to(SUMS) * LOG2E
    return tl.cumsum(step, 0), tl.sum(step, 0)


@triton.jit
def power(x):
    """2^x of a sum x <= 0, in float32."""
    return tl.exp2(x.to(tl.float32))


@triton.jit
def seen_in(first, C: tl.constexpr, LATER_ROWS: tl.constexpr):
    """Which pairs of a chunk see each other: rows are queries (the later ones), or keys.

    By positions: with indices alone it would be the same for every chunk, and would be kept in
    registers from chunk to chunk.
    """
    at = first + tl.arange(0, C)
    return at[:, None] >= at[None, :] if LATER_ROWS else at[None, :] >= at[:, None]


@triton.jit
def inside(first, sums, C: tl.constexpr, SUMS: tl.constexpr, LATER_ROWS: tl.constexpr):
    """Decays between the positions of a chunk, 0 towards the past; `sums` are those of `steps`."""
    high = sums.to(tl.float32)
    rows, columns = high[:, None], high[None, :]
    difference = rows - columns if LATER_ROWS else columns - rows
    # In two terms: their differences lose nothing.
    if SUMS == tl.float64:  # noqa: SIM300
        low = (sums - high.to(tl.float64)).to(tl.float32)
        rows, columns = low[:, None], low[None, :]
        difference += rows - columns if LATER_ROWS else columns - rows
    return tl.exp2(tl.where(seen_in(first, C, LATER_ROWS), difference, float("-inf")))


@triton.jit
def times(weight, x):
    """weight x, and exactly 0 where the weight is 0, whatever x is."""
    return tl.where(weight == 0, 0.0, weight * x)
