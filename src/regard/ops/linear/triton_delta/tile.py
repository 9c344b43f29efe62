"""What the kernels share: tiles of tokens, decays between them, and numbers that overflowed.

All of it runs inside kernels. What is known of a token before any product (`tokens.py`) lies in
planes of float32: the sum of log decays since its chunk began as two floats, how often all was
forgotten since then, and for unit keys a power of two that brings the key near 1 and then 1 / |k|.
Such keys lie beside them, brought near 1, so that products read them as they are.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
LARGEST = tl.constexpr(1e38)  # what is above counts as overflowed
HIGH, LOW, CUTS, SHRINK, UNIT = (tl.constexpr(plane) for plane in range(5))


@triton.jit
def rows_at(x, tokens, stride, T, D: tl.constexpr, DP: tl.constexpr):
    """Rows [., DP] of an operand [T, D]; 0 outside."""
    channels = tl.arange(0, DP)
    there = (tokens < T)[:, None] & (channels < D)[None, :]
    at = (tokens.to(tl.int64) * stride)[:, None] + channels[None, :]
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit
def put_rows(x, tokens, stride, T, rows, D: tl.constexpr, DP: tl.constexpr):
    """Writes rows [., DP] to [T, D]."""
    channels = tl.arange(0, DP)
    there = (tokens < T)[:, None] & (channels < D)[None, :]
    at = (tokens.to(tl.int64) * stride)[:, None] + channels[None, :]
    tl.store(x + at, rows.to(x.dtype.element_ty), mask=there)


@triton.jit
def keys_at(
    k,
    facts,
    plane,
    tokens,
    stride,
    T,
    F: tl.constexpr,
    FP: tl.constexpr,
    NORMALISE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Keys [., FP] as an operand, and what multiplies each of them: 1 / |k| or 1."""
    keys = rows_at(k, tokens, stride, T, F, FP)
    if NORMALISE:
        unit = tl.load(facts + UNIT * plane + tokens)
    else:
        unit = tl.full(tokens.shape, 1.0, tl.float32)
    return keys.to(OPERAND), unit


@triton.jit
def sums_at(facts, plane, tokens, HAS_DECAY: tl.constexpr):
    """Sum of log decays in two floats, and cuts, since the chunk began."""
    if HAS_DECAY:
        high = tl.load(facts + HIGH * plane + tokens)
        low = tl.load(facts + LOW * plane + tokens)
        cuts = tl.load(facts + CUTS * plane + tokens)
    else:
        high = tokens.to(tl.float32) * 0.0
        low = high
        cuts = high
    return high, low, cuts


@triton.jit
def entering(high, low, cuts, HAS_DECAY: tl.constexpr):
    """Decay from before the chunk to a token; exactly 0 where all was forgotten."""
    factor = high * 0.0 + 1.0
    if HAS_DECAY:
        factor = tl.where(cuts == 0.0, tl.exp(high + low), 0.0)
    return factor


@triton.jit
def between(high_t, low_t, cuts_t, high_j, low_j, cuts_j, seen, HAS_DECAY: tl.constexpr):
    """Decays from tokens j to tokens t, of shapes that broadcast; exactly 0 where not `seen`."""
    if HAS_DECAY:
        seen = seen & (cuts_t == cuts_j)
        inside = tl.where(seen, tl.exp((high_t - high_j) + (low_t - low_j)), 0.0)
    else:
        inside = tl.where(seen, 1.0, 0.0)
    return inside, seen


@triton.jit
def kept(product, factor):
    """product * factor [.][:, None]; exactly 0 where the factor is, whatever the product."""
    return tl.where((factor == 0.0)[:, None], 0.0, product * factor[:, None])


@triton.jit
def overflowed(x):
    """1 where x is no usable number, else 0."""
    return tl.where(tl.abs(x) < LARGEST, 0, 1)


@triton.jit
def usable(x):
    """x, 0 where it has overflowed: it must not meet rows that do not see it as 0 * inf."""
    return tl.where(tl.abs(x) < LARGEST, x, 0.0)


@triton.jit
def triangle(inverse, row, OPERAND: tl.constexpr):
    """The stored inverse [C, C] of a chunk; its blocks above the diagonal were never written."""
    t = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    at = inverse + row * (CHUNK * CHUNK) + t * CHUNK + j
    return tl.load(at, mask=j // 16 <= t // 16, other=0.0).to(OPERAND)


@triton.jit
def square_at(rows: tl.constexpr, columns: tl.constexpr):
    """Offsets of a tile that lies in memory row after row."""
    return (tl.arange(0, rows) * columns)[:, None] + tl.arange(0, columns)[None, :]
