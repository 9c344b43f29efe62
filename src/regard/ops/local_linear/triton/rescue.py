"""Rows that could not be computed in 16 or 32 bits, again in float64, from the operands as given.

A row comes here when it is not solved within the iterations allowed, when its g would be lost in
rounding, when it sees a key beyond the range of the prepared ones, or when it came out as no
number. Only that row decides, and only that row is written. The kernel is always launched, and
ends at once where a tile has no such row: so nobody has to wait for the device to tell.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.local_linear.triton.tile import visible
from regard.ops.local_linear.triton.walk import key_range, put_rows, raw_rows, row_decay

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _settled(x):
    """x, by a sum of one term: else the compiler gives an operand the layout of a shorter type."""
    return tl.sum(tl.expand_dims(x, 0), 0)


@triton.jit
def _tile(
    j0, x, stride, middle, real, real_step, S, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Keys or values of a tile less `middle`, in float64; 0 where masked or outside."""
    j = j0 + tl.arange(0, N)
    there = j < S
    if HAS_MASK:
        there = there & (tl.load(real + j * real_step, mask=there, other=0) != 0)
    channels = tl.arange(0, DP)
    inside = there[:, None] & (channels < D)[None, :]
    places = (j.to(tl.int64) * stride)[:, None] + channels[None, :]
    tile = tl.load(x + places, mask=inside, other=0.0).to(tl.float64) - middle
    return _settled(tl.where(inside, tile, 0.0))


@triton.jit
def _weights(
    j0, queries, k, top, bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):
    """Scores in bits, -inf where hidden, and 2^(s - top)."""
    j = j0 + tl.arange(0, N)
    s = tl.dot(queries, tl.trans(k), out_dtype=tl.float64)
    if HAS_BIAS:
        s += tl.load(bias + j).to(tl.float64)[None, :]
    if HAS_DECAY:
        s += (row_high[:, None] - tl.load(high + j)[None, :]).to(tl.float64)
        s += (row_low[:, None] - tl.load(low + j)[None, :]).to(tl.float64)
    shown = visible(
        (i + (S - T))[:, None], j[None, :], row_first[:, None], S, left, right,
        HAS_LEFT, HAS_RIGHT, HAS_DECAY,
    )
    s = tl.where(shown, s, float("-inf"))
    return s, tl.exp2(s - top[:, None])


@triton.jit
def _solve_again(
    tile, pair, wanted,
    q, k, v, key_mask, probe, centre, sigma, scale, ridge, bias, high, low, first, row_bias,
    failed, out, slope, lse_io, iterations, residual, top_io, total_io, mean_io,
    qb, qh, qt, kb, kh, ks, vb, vh, vs, mb, ms, gb, gh, gt, scale_b, scale_h,
    ridge_b, ridge_h, ridge_t, row_bias_b, row_bias_h, row_bias_t,
    T, S, length, left, right, tol, limit,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SOLVED: tl.constexpr, GIVEN: tl.constexpr,
    ABSOLUTE: tl.constexpr, INTERCEPT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):
    rows = pair.to(tl.int64) * T
    i = tile * M + tl.arange(0, M)
    live = i < T
    b = pair // H
    h = pair % H
    key_head = h // (H // HK)
    k += b.to(tl.int64) * kb + key_head.to(tl.int64) * kh
    v += b.to(tl.int64) * vb + key_head.to(tl.int64) * vh
    if HAS_MASK:
        key_mask += b.to(tl.int64) * mb
    key_head += b * HK
    middle = tl.load(centre + key_head * DP + tl.arange(0, DP)).to(tl.float64)[None, :]
    x = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    x = _settled(x.to(tl.float64))
    scaling = tl.load(scale + b * scale_b + h * scale_h).to(tl.float64)
    queries = x * (scaling * LOG2E)
    if HAS_BIAS:
        bias += head_of(pair, H, BIAS_HEADS).to(tl.int64) * length
    if HAS_DECAY:
        at = head_of(pair, H, DECAY_HEADS).to(tl.int64) * length
        high += at
        low += at
        first += at
    row_high, row_low, row_first = row_decay(high, low, first, i, T, S, HAS_DECAY, CAUSAL)
    start, _whole, _cut, stop = key_range(
        tile * M, tl.minimum(tile * M + M, T), first, T, S, left, right,
        N, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_DECAY,
    )

    top = tl.full([M], float("-inf"), tl.float64)
    total = tl.zeros([M], tl.float64)
    kbar = tl.zeros([M, DP], tl.float64)
    for j0 in range(start, stop, N):
        keys = _tile(j0, k, ks, middle, key_mask, ms, S, N, D, DP, HAS_MASK)
        s, p = _weights(
            j0, queries, keys, top, bias, high, low, i, row_high, row_low, row_first,
            T, S, left, right, N, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY,
        )
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        kbar = kbar * shrink[:, None] + tl.dot(p, keys, out_dtype=tl.float64)
        top = new
    some = total > 0
    inverse = tl.where(some, 1.0 / total, 0.0)
    kbar = kbar * inverse[:, None]
    base = tl.where(some, top, 0.0)
    if not INTERCEPT:
        kbar = kbar * 0.0
    lse = top * LN2 + tl.log(total.to(tl.float32)).to(tl.float64)
    lse += tl.sum(x * middle, 1) * scaling
    if HAS_ROW_BIAS:
        place = b.to(tl.int64) * row_bias_b + h * row_bias_h + i.to(tl.int64) * row_bias_t
        lse += tl.load(row_bias + place, mask=live, other=0.0).to(tl.float64)
    lse = tl.where(some, lse, float("-inf"))

    g = tl.zeros([M, DP], tl.float64)
    if GIVEN:
        probe += b.to(tl.int64) * gb + h.to(tl.int64) * gh
        g = _settled(raw_rows(probe, i, gt, T, D, DP).to(tl.float64))
    if SOLVED:
        place = b * ridge_b + h * ridge_h + i.to(tl.int64) * ridge_t
        shift = tl.load(ridge + place, mask=live, other=1.0).to(tl.float64)
        if ABSOLUTE:
            shift = shift * tl.exp(-tl.where(some, lse, 0.0).to(tl.float32)).to(tl.float64)
        r = kbar - (x - middle)
        r = tl.where((some & live)[:, None], r, 0.0)
        whole = tl.sum(r * r, 1)
        size = whole
        goal = whole * tol * tol
        active = wanted & (size > goal) & (size < float("inf"))
        p = tl.where(active[:, None], r, 0.0)
        steps = tl.zeros([M], tl.int32)
        count = 0
        going = tl.max(active.to(tl.int32), 0)
        while (going > 0) & (count < limit):
            y = tl.zeros([M, DP], tl.float64)
            c = tl.sum(p * kbar, 1)
            for j0 in range(start, stop, N):
                keys = _tile(j0, k, ks, middle, key_mask, ms, S, N, D, DP, HAS_MASK)
                s, w = _weights(
                    j0, queries, keys, base, bias, high, low, i, row_high, row_low,
                    row_first, T, S, left, right, N, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY,
                )
                w = w * (tl.dot(p, tl.trans(keys), out_dtype=tl.float64) - c[:, None])
                w = tl.where(s == float("-inf"), 0.0, w)
                y += tl.dot(w, keys, out_dtype=tl.float64)
            y = y * inverse[:, None] + shift[:, None] * p
            curvature = tl.sum(p * y, 1)
            active = active & (curvature > 0) & (curvature < float("inf"))
            a = tl.where(active, size / curvature, 0.0)
            g += a[:, None] * p
            r = tl.where(active[:, None], r - a[:, None] * y, r)
            smaller = tl.where(active, tl.sum(r * r, 1), size)
            steps += active.to(tl.int32)
            active = active & (smaller > goal) & (smaller < float("inf"))
            p = tl.where(active[:, None], r + (smaller / size)[:, None] * p, 0.0)
            size = smaller
            going = tl.max(active.to(tl.int32), 0)
            count += 1
        ratio = tl.sqrt(tl.where(whole > 0, size / whole, 0.0))
        # Singular even so: the local average.
        lost = (ratio > tol * 1.00001) & (tol > 0)
        lost = lost | (tl.sum(g * 0.0, 1) != 0.0)
        g = tl.where(lost[:, None], 0.0, g)
        ratio = tl.where(lost, 1.0, ratio)

    at_zero = tl.sum(g * kbar, 1)
    if INTERCEPT:
        at_zero += 1.0
    o = tl.zeros([M, DVP], tl.float64)
    for j0 in range(start, stop, N):
        keys = _tile(j0, k, ks, middle, key_mask, ms, S, N, D, DP, HAS_MASK)
        s, w = _weights(
            j0, queries, keys, base, bias, high, low, i, row_high, row_low, row_first,
            T, S, left, right, N, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY,
        )
        w = w * (at_zero[:, None] - tl.dot(g, tl.trans(keys), out_dtype=tl.float64))
        w = tl.where(s == float("-inf"), 0.0, w)
        values = _tile(j0, v, vs, 0.0, key_mask, ms, S, N, DV, DVP, HAS_MASK)
        o += tl.dot(w, values, out_dtype=tl.float64)
    o = o * inverse[:, None]
    only = tl.where(wanted, i, T)  # rows beyond T are not written
    put_rows(out + rows * DV, only, T, o, DV, DVP)
    at = rows + i
    tl.store(lse_io + at, lse.to(tl.float32), mask=wanted)
    tl.store(top_io + at, top.to(tl.float32), mask=wanted)
    tl.store(total_io + at, total.to(tl.float32), mask=wanted)
    if SOLVED:
        size_of_keys = tl.load(sigma + key_head * 2).to(tl.float64)
        put_rows(mean_io + rows * D, only, T, kbar / size_of_keys, D, DP)
        put_rows(slope + rows * D, only, T, g, D, DP)
        tl.store(iterations + at, steps, mask=wanted)
        tl.store(residual + at, ratio.to(tl.float32), mask=wanted)


@triton.jit(
    do_not_specialize=["T", "S", "left", "right", "tiles", "pairs", "limit", "tol"]
)
def rescue_kernel(
    q, k, v, key_mask, probe, centre, sigma, scale, ridge, bias, high, low, first, row_bias,
    failed, out, slope, lse_io, iterations, residual, top_io, total_io, mean_io,
    qb, qh, qt, kb, kh, ks, vb, vh, vs, mb, ms, gb, gh, gt, scale_b, scale_h,
    ridge_b, ridge_h, ridge_t, row_bias_b, row_bias_h, row_bias_t,
    T, S, length, left, right, tiles, pairs, tol, limit,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
    SOLVED: tl.constexpr, GIVEN: tl.constexpr, ABSOLUTE: tl.constexpr,
    INTERCEPT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):
    """Each program looks at TILES tiles of M rows, and computes those that failed."""
    pair = tl.program_id(0) // tiles
    first_tile = tl.program_id(0) % tiles * TILES
    around = pair.to(tl.int64) * T
    all_rows = first_tile * M + tl.arange(0, TILES * M)
    some = tl.load(failed + around + all_rows, mask=all_rows < T, other=0)
    if tl.max(some.to(tl.int32), 0) > 0:
        for tile in range(first_tile, first_tile + TILES):
            i = tile * M + tl.arange(0, M)
            wanted = tl.load(failed + around + i, mask=i < T, other=0) != 0
            if tl.max(wanted.to(tl.int32), 0) > 0:
                _solve_again(
                    tile, pair, wanted,
                    q, k, v, key_mask, probe, centre, sigma, scale, ridge, bias, high, low, first,
                    row_bias, failed, out, slope, lse_io, iterations, residual, top_io, total_io,
                    mean_io, qb, qh, qt, kb, kh, ks, vb, vh, vs, mb, ms, gb, gh, gt, scale_b,
                    scale_h, ridge_b, ridge_h, ridge_t, row_bias_b, row_bias_h, row_bias_t, T, S,
                    length, left, right, tol, limit, H, HK, BIAS_HEADS, DECAY_HEADS, D, DP, DV, DVP,
                    M, N, SOLVED, GIVEN, ABSOLUTE, INTERCEPT, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_BIAS,
                    HAS_DECAY, HAS_ROW_BIAS, HAS_MASK,
                )
