"""Small heads solved directly: one pass sums products of pairs of channels, a second kernel solves.

With D <= 16 channels, f_j = (k_a k_b for a >= b) has 136 entries: sum_j p_j f_j, beside the mean
key, is a product of weights and features on tensor cores, and costs as much as one or two steps
of conjugate gradients. The matrix of a row is then solved with in registers, for any keys.

Features are two matrices, as widths are powers of two: the first WIDE = 128 pairs, and REST = 32
columns: the last 8 pairs, the 16 channels of the key themselves, and zeros.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.local_linear.triton.forward import LN2, LOG2E, _online, tile_scores
from regard.ops.local_linear.triton.tile import split
from regard.ops.local_linear.triton.walk import (
    key_range,
    operand_rows,
    place,
    put_rows,
    raw_rows,
    row_decay,
    start_of,
    tile_of,
)

DP = tl.constexpr(16)
WIDE = tl.constexpr(128)
REST = tl.constexpr(32)
LAST = tl.constexpr(8)  # pairs among the columns of REST
WIDTH = tl.constexpr(160)
LARGEST = tl.constexpr(60000.0)
NOISE = tl.constexpr(1e-3)
ROUGH = tl.constexpr(1e-2)
EPSILON = tl.constexpr(1.1920929e-07)


@triton.jit
def features_kernel(
    keys, wide, rest, overflow, length, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """The features of every prepared key [B * Hk, S', 16]; overflow as `prepare` has it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * length + rows
    keys += at[:, None] * DP
    pairs = tl.arange(0, WIDE)
    first = tl.zeros([WIDE], tl.int32)
    for a in tl.static_range(1, 16):
        first += (pairs >= a * (a + 1) // 2).to(tl.int32)
    second = pairs - first * (first + 1) // 2
    x = tl.load(keys + first[None, :]).to(tl.float32)
    f = x * tl.load(keys + second[None, :]).to(tl.float32)
    columns = tl.arange(0, REST)
    is_pair = columns < LAST
    channel = tl.minimum(tl.maximum(columns - LAST, 0), DP - 1)
    # The last pairs are those of the last channel with all but the first eight.
    x = tl.load(keys + tl.where(is_pair, DP - 1, channel)[None, :]).to(tl.float32)
    y = tl.load(keys + tl.where(is_pair, LAST + columns, 0)[None, :]).to(tl.float32)
    g = tl.where(is_pair[None, :], x * y, x)
    g = tl.where((columns < LAST + DP)[None, :], g, 0.0)
    if HALF:
        large = (tl.max(tl.abs(f), 1) > LARGEST) | (tl.max(tl.abs(g), 1) > LARGEST)
        f = tl.minimum(tl.maximum(f, -LARGEST), LARGEST)
        g = tl.minimum(tl.maximum(g, -LARGEST), LARGEST)
        earliest = tl.min(tl.where(large, rows, length), 0)
        if earliest < length:
            tl.atomic_min(overflow + tl.program_id(1), earliest)
    tl.store(wide + at[:, None] * WIDE + pairs[None, :], f.to(wide.dtype.element_ty))
    tl.store(rest + at[:, None] * REST + columns[None, :], g.to(rest.dtype.element_ty))


@triton.jit
def _gather_step(
    j0, q, factor, top, total, sums, others, keys, key_row, wide, rest,
    bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    N: tl.constexpr, HIGH: tl.constexpr, LIFT: tl.constexpr, OPERAND: tl.constexpr,
    DESCRIPTOR: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tile_of(keys, key_row + j0, N, DP, DESCRIPTOR)
    s = tile_scores(
        q, k, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low, row_first,
        T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED, PRECISION,
    )
    p, top, total, shrink = _online(s, top, total, LIFT)
    sums = sums * shrink[:, None]
    others = others * shrink[:, None]
    f = tile_of(wide, j0, N, WIDE, False)
    g = tile_of(rest, j0, N, REST, False)
    if HIGH:
        p, less = split(p, OPERAND)
        sums = tl.dot(less, f, sums, input_precision=PRECISION)
        others = tl.dot(less, g, others, input_precision=PRECISION)
    p = p.to(OPERAND)
    sums = tl.dot(p, f, sums, input_precision=PRECISION)
    others = tl.dot(p, g, others, input_precision=PRECISION)
    return top, total, sums, others


@triton.jit(do_not_specialize=["T", "S", "left", "right", "tiles", "together", "pairs", "skip"])
def gather_kernel(
    q, keys, wide, rest, centre, sigma, scale, bias, high, low, first, row_bias,
    scratch, top_out, total_out, lse_out,
    qb, qh, qt, scale_b, scale_h, row_bias_b, row_bias_h, row_bias_t,
    T, S, length, left, right, tiles, together, pairs, skip,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HIGH: tl.constexpr, HALF: tl.constexpr, OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_ROW_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """top, total, lse of every row, and the weighted means of its features [M, 160]."""
    LIFT: tl.constexpr = 6.0 if HALF else 0.0
    tile, pair = place(tl.program_id(0) + skip, tiles, pairs, together)
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    i = tile * M + tl.arange(0, M)
    x = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    queries, guard = operand_rows(x, HALF, OPERAND)
    scaling = tl.load(scale + b * scale_b + h * scale_h)
    factor = guard * (scaling * LOG2E * tl.load(sigma + key_head * 2))
    key_source, key_row = start_of(keys, key_head, length, DP, DESCRIPTOR)
    wide += key_head.to(tl.int64) * length * WIDE
    rest += key_head.to(tl.int64) * length * REST
    if HAS_BIAS:
        bias += head_of(pair, H, BIAS_HEADS).to(tl.int64) * length
    if HAS_DECAY:
        at = head_of(pair, H, DECAY_HEADS).to(tl.int64) * length
        high += at
        low += at
        first += at
    row_high, row_low, row_first = row_decay(high, low, first, i, T, S, HAS_DECAY, CAUSAL)
    start, whole, cut, stop = key_range(
        tile * M, tl.minimum(tile * M + M, T), first, T, S, left, right,
        N, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_DECAY,
    )
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDE], tl.float32)
    others = tl.zeros([M, REST], tl.float32)
    if HAS_LEFT or HAS_DECAY:
        for j0 in tl.range(start, whole, N):
            top, total, sums, others = _gather_step(
                j0, queries, factor, top, total, sums, others, key_source, key_row, wide, rest,
                bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
                N, HIGH, LIFT, OPERAND, DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY,
                True, PRECISION,
            )
    for j0 in tl.range(whole, cut, N):
        top, total, sums, others = _gather_step(
            j0, queries, factor, top, total, sums, others, key_source, key_row, wide, rest,
            bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
            N, HIGH, LIFT, OPERAND, DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY,
            False, PRECISION,
        )
    for j0 in tl.range(cut, stop, N):
        top, total, sums, others = _gather_step(
            j0, queries, factor, top, total, sums, others, key_source, key_row, wide, rest,
            bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
            N, HIGH, LIFT, OPERAND, DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY,
            True, PRECISION,
        )
    some = total > 0
    inverse = tl.where(some, 1.0 / total, 0.0)[:, None]
    out = scratch + (tl.program_id(0).to(tl.int64) * M + tl.arange(0, M))[:, None] * WIDTH
    tl.store(out + tl.arange(0, WIDE)[None, :], sums * inverse)
    tl.store(out + WIDE + tl.arange(0, REST)[None, :], others * inverse)
    total = total * (0.015625 if HALF else 1.0)  # without the lift
    lse = top * LN2 + tl.log(total)
    x = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    middle = tl.load(centre + key_head * DP + tl.arange(0, DP))
    lse += scaling * tl.sum(x * middle[None, :], 1)
    live = i < T
    if HAS_ROW_BIAS:
        place_of = b.to(tl.int64) * row_bias_b + h * row_bias_h + i.to(tl.int64) * row_bias_t
        lse += tl.load(row_bias + place_of, mask=live, other=0.0)
    lse = tl.where(some, lse, float("-inf"))
    rows = pair.to(tl.int64) * T + i
    tl.store(top_out + rows, top, mask=live)
    tl.store(total_out + rows, total, mask=live)
    tl.store(lse_out + rows, lse, mask=live)


@triton.jit(
    do_not_specialize=["T", "S", "right", "tiles", "together", "pairs", "skip", "tol", "limit"]
)
def solve_kernel(
    scratch, q, centre, sigma, overflow, ridge, total_in, lse_in,
    mean, slope, iterations, residual, failed,
    qb, qh, qt, ridge_b, ridge_h, ridge_t,
    T, S, right, tiles, together, pairs, skip, tol, limit,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
    ABSOLUTE: tl.constexpr, INTERCEPT: tl.constexpr, HALF: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """g [B, H, T, D] in the original coordinates, and the mean key in those of prepared keys."""
    PIECES: tl.constexpr = M // ROWS
    program = tl.program_id(0) // PIECES
    offset = (tl.program_id(0) % PIECES) * ROWS + tl.arange(0, ROWS)
    tile, pair = place(program + skip, tiles, pairs, together)
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    i = tile * M + offset
    live = i < T
    rows = pair.to(tl.int64) * T
    source = scratch + (program.to(tl.int64) * M + offset) * WIDTH
    channels = tl.arange(0, DP)
    one = tl.maximum(channels[:, None], channels[None, :])
    two = tl.minimum(channels[:, None], channels[None, :])
    matrix = tl.load(source[:, None, None] + (one * (one + 1) // 2 + two)[None, :, :])
    sigma_k = tl.load(sigma + key_head * 2)
    raw = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    middle = tl.load(centre + key_head * DP + channels)[None, :]
    r = -(raw - middle) * (1.0 / sigma_k)
    r = tl.where(channels[None, :] < D, r, 0.0)
    norms = tl.zeros([ROWS], tl.float32)
    kbar = r * 0.0
    if INTERCEPT:
        kbar = tl.load(source[:, None] + WIDE + LAST + channels[None, :])
        norms = tl.sqrt(tl.sum(kbar * kbar, 1))
        r += kbar
        matrix -= kbar[:, :, None] * kbar[:, None, :]
    put_rows(mean + rows * D, i, T, kbar, D, DP)
    total = tl.load(total_in + rows + i, mask=live, other=0.0)
    some = (total > 0) & live
    shift = tl.load(
        ridge + b * ridge_b + h * ridge_h + i.to(tl.int64) * ridge_t, mask=live, other=1.0
    )
    if ABSOLUTE:
        lse = tl.load(lse_in + rows + i, mask=live, other=0.0)
        shift = shift * tl.exp(-tl.where(some, lse, 0.0))
    shift = shift / (sigma_k * sigma_k)
    r = tl.where(some[:, None], r, 0.0)
    right_side = r
    whole = tl.sum(r * r, 1)
    x = r * 0.0
    p = r
    size = whole
    aim = whole * (tol * tol)
    active = (size > aim) & (size < float("inf"))
    steps = tl.zeros([ROWS], tl.int32)
    count = 0
    while (tl.max(active.to(tl.int32), 0) > 0) & (count < limit):
        y = tl.sum(matrix * p[:, None, :], 2) + shift[:, None] * p
        curvature = tl.sum(p * y, 1)
        active = active & (curvature > 0) & (curvature < float("inf"))
        a = tl.where(active, size / curvature, 0.0)
        x += a[:, None] * p
        r = tl.where(active[:, None], r - a[:, None] * y, r)
        now = tl.where(active, tl.sum(r * r, 1), size)
        p = tl.where(active[:, None], r + (now / size)[:, None] * p, p)
        size = now
        steps += active.to(tl.int32)
        active = active & (size > aim)
        count += 1
    rest = right_side - tl.sum(matrix * x[:, None, :], 2) - shift[:, None] * x
    nothing = whole <= 0
    left_over = tl.sqrt(tl.sum(rest * rest, 1) / tl.where(nothing, 1.0, whole))
    left_over = tl.where(nothing, 0.0, left_over)
    noise = EPSILON * tl.sqrt(tl.sum(x * x, 1)) * (norms + tl.sqrt(whole))
    bad = ~(left_over < ROUGH) | ~(noise < NOISE)
    x = tl.where(bad[:, None], 0.0, x)
    left_over = tl.where(bad, 1.0, left_over)
    if HALF:
        last = tl.zeros([ROWS], tl.int32) + (S - 1)
        if HAS_RIGHT:
            last = tl.minimum(last, i + (S - T) + right)
        bad = bad | (last >= tl.load(overflow + key_head))
    put_rows(slope + rows * D, i, T, x * (1.0 / sigma_k), D, DP)
    tl.store(iterations + rows + i, steps, mask=live)
    tl.store(residual + rows + i, left_over, mask=live)
    tl.store(failed + rows + i, (bad & some).to(tl.int8), mask=live)
