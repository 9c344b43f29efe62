"""Where a program stands: its tile and head, its rows, the keys that it walks over.

Matrices of keys and values are stored without gaps, rows padded to a multiple of 128 and
channels to a power of two, all with zeros (`prepare`).
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import power_of_two


@triton.jit
def place(program, tiles, heads, together):
    """(tile of queries, head) of a program: the last tiles, the heaviest, come first.

    `together` heads are in flight at once, so that their keys stay in the cache.
    """
    group = program // (tiles * together)
    first = group * together
    count = tl.minimum(heads - first, together)
    rest = program - group * tiles * together
    return tiles - 1 - rest // count, first + rest % count


@triton.jit
def start_of(matrix, head, length, WIDTH: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """A head's part of a matrix [heads * length, WIDTH]: what to read from, and its first row."""
    if DESCRIPTOR:
        source = matrix
        row = head * length
    else:
        source = matrix + head.to(tl.int64) * length * WIDTH
        row = head * 0
    return source, row


@triton.jit
def tile_of(source, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Rows [start, start + ROWS) of a matrix."""
    if DESCRIPTOR:
        tile = source.load([start, 0])
    else:
        rows = start + tl.arange(0, ROWS)
        tile = tl.load(source + (rows * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :])
    return tile


@triton.jit
def raw_rows(x, i, stride, T, D: tl.constexpr, DP: tl.constexpr):
    """Rows i of x [T, D] as float32 [M, DP]; 0 beyond T and D."""
    channels = tl.arange(0, DP)
    there = (i < T)[:, None] & (channels < D)[None, :]
    places = (i.to(tl.int64) * stride)[:, None] + channels[None, :]
    return tl.load(x + places, mask=there, other=0.0).to(tl.float32)


@triton.jit
def state_rows(x, i, T, D: tl.constexpr, DP: tl.constexpr):
    """Rows i of a contiguous x [T, D] as float32 [M, DP], by 32-bit offsets."""
    channels = tl.arange(0, DP)
    there = (i < T)[:, None] & (channels < D)[None, :]
    return tl.load(x + ((i * D)[:, None] + channels[None, :]), mask=there, other=0.0).to(tl.float32)


@triton.jit
def put_rows(target, i, T, values, D: tl.constexpr, DP: tl.constexpr):
    """Writes [M, DP] to rows i of a contiguous [T, D], by 32-bit offsets."""
    channels = tl.arange(0, DP)
    there = (i < T)[:, None] & (channels < D)[None, :]
    places = (i * D)[:, None] + channels[None, :]
    values = values.to(tl.float32).to(target.dtype.element_ty)  # float64 to bfloat16: not in one
    tl.store(target + places, values, mask=there)


@triton.jit
def operand_rows(x, HALF: tl.constexpr, OPERAND: tl.constexpr):
    """x as an operand of products, and the power of two per row by which it was divided."""
    guard = tl.sum(x * 0.0, 1) + 1.0
    if HALF:
        guard = power_of_two(tl.max(tl.abs(x), 1))
        x = x * (1.0 / guard)[:, None]
    return x.to(OPERAND), guard


@triton.jit
def key_position(i, T, S, CAUSAL: tl.constexpr):
    """The key at which query i reads its decay."""
    if CAUSAL:
        at = tl.minimum(tl.maximum(i + (S - T), 0), tl.maximum(S - 1, 0))
    else:
        at = i * 0 + tl.maximum(S - 1, 0)
    return at


@triton.jit
def row_decay(high, low, first, i, T, S, HAS_DECAY: tl.constexpr, CAUSAL: tl.constexpr):
    """The decay sums of rows in two parts, and their first visible keys."""
    row_high = i.to(tl.float32) * 0.0
    row_low = row_high
    row_first = i * 0
    if HAS_DECAY:
        at = key_position(i, T, S, CAUSAL)
        row_high = tl.load(high + at)
        row_low = tl.load(low + at)
        row_first = tl.load(first + at)
    return row_high, row_low, row_first


@triton.jit
def key_range(
    i0, i1, first, T, S, left, right,
    N: tl.constexpr, CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):
    """Keys of queries [i0, i1): from `start` to `stop`, all of them seen in [whole, cut).

    The first three are multiples of N. What a decay has forgotten is skipped too: the first
    visible key never moves back.
    """
    offset = S - T
    low = 0
    full = 0
    stop = S
    cut = S
    if HAS_LEFT:
        low = tl.maximum(i0 + offset - left, 0)
        full = tl.maximum(i1 - 1 + offset - left, 0)
    if HAS_DECAY:
        low = tl.maximum(low, tl.load(first + key_position(i0, T, S, CAUSAL)))
        full = tl.maximum(full, tl.load(first + key_position(i1 - 1, T, S, CAUSAL)))
    if HAS_RIGHT:
        stop = tl.minimum(S, tl.maximum(i1 + offset + right, 0))
        cut = tl.minimum(S, tl.maximum(i0 + offset + right + 1, 0))
    start = low // N * N
    whole = tl.minimum((full + N - 1) // N * N, (stop + N - 1) // N * N)
    whole = tl.maximum(whole, start)
    cut = tl.maximum(cut // N * N, whole)
    return start, whole, cut, stop


@triton.jit
def part_of(
    part: tl.constexpr, start, whole, cut, stop, HAS_LEFT: tl.constexpr, HAS_DECAY: tl.constexpr
):
    """The ends of one of the three parts of `key_range`; the middle one needs no masks."""
    if part == 0:
        low = start
        high = whole
        if not (HAS_LEFT or HAS_DECAY):
            high = start  # nothing cuts on the left
    elif part == 1:
        low = whole
        high = cut
    else:
        low = cut
        high = stop
    return low, high


@triton.jit
def beyond(overflow, i, T, S, right, HAS_RIGHT: tl.constexpr):
    """Whether queries stand at or after the first key that was cut off."""
    last = i * 0 + (S - 1)
    if HAS_RIGHT:
        last = tl.minimum(last, i + (S - T) + right)
    return last >= tl.load(overflow)
