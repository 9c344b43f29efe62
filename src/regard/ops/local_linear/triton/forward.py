"""The passes over the keys before and after the solve: mean key, and output.

    mean     s = q . k;                p = 2^(s - top);  total = sum p;  kbar = sum p k / total
    output   s = q . k,  t = g . k;    o = sum p (1 - (t - g . kbar)) v / total

`mean` with values in the place of keys is softmax attention. Weights are held as
2^(s - top + LIFT), so that small ones stay normal numbers in float16.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.local_linear.triton.tile import scores, split, visible
from regard.ops.local_linear.triton.walk import (
    beyond,
    key_range,
    operand_rows,
    part_of,
    place,
    put_rows,
    raw_rows,
    row_decay,
    start_of,
    tile_of,
)

NOISE = tl.constexpr(0.25)  # by which signed weights may miss their sum; a row that does fails
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_scores(
    q, k, factor, j, bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DECAY: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores [M, N] in bits; with MASKED, -inf where position hides the key."""
    return scores_of(
        tl.dot(q, tl.trans(k), input_precision=PRECISION), factor, j, bias, high, low, i,
        row_high, row_low, row_first, T, S, left, right,
        HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED,
    )


@triton.jit
def scores_of(
    product, factor, j, bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DECAY: tl.constexpr, MASKED: tl.constexpr,
):
    """The same from the products of queries and keys."""
    bias_j = 0.0
    high_j = 0.0
    low_j = 0.0
    if HAS_BIAS:
        bias_j = tl.load(bias + j)[None, :]
    if HAS_DECAY:
        high_j = tl.load(high + j)[None, :]
        low_j = tl.load(low + j)[None, :]
    s = scores(
        product, factor[:, None], bias_j, row_high[:, None], row_low[:, None], high_j, low_j,
        HAS_BIAS, HAS_DECAY,
    )
    if MASKED:
        shown = visible(
            (i + (S - T))[:, None], j[None, :], row_first[:, None], S, left, right,
            HAS_LEFT, HAS_RIGHT, HAS_DECAY,
        )
        s = tl.where(shown, s, float("-inf"))
    return s


@triton.jit
def as_loaded(x, scratch, M: tl.constexpr, DP: tl.constexpr):
    """An operand [M, DP] by way of memory.

    The compiler multiplies what was computed from registers, and where these are scarce it has
    every product wait for the one before; what was loaded it multiplies from shared memory.
    """
    places = (tl.arange(0, M) * DP)[:, None] + tl.arange(0, DP)[None, :]
    tl.store(scratch + places, x)
    tl.debug_barrier()  # what one thread wrote another reads
    return tl.load(scratch + places)


@triton.jit
def stacked(x, y, scratch, M: tl.constexpr, DP: tl.constexpr):
    """[x; y]: two operands [M, DP] as one, so that both products are made at once."""
    places = (tl.arange(0, M) * DP)[:, None] + tl.arange(0, DP)[None, :]
    tl.store(scratch + places, x)
    tl.store(scratch + M * DP + places, y)
    tl.debug_barrier()
    return tl.load(scratch + (tl.arange(0, 2 * M) * DP)[:, None] + tl.arange(0, DP)[None, :])


@triton.jit
def two_products(both, k, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """x k^T and y k^T [M, N] of both = [x; y]: nothing waits for the first before the second."""
    product = tl.dot(both, tl.trans(k), input_precision=PRECISION)
    return tl.split(tl.permute(tl.reshape(product, (2, M, N)), (1, 2, 0)))


@triton.jit
def _online(s, top, total, LIFT: tl.constexpr):
    """Weights of a tile under the new top, the new top and total, and what the old are worth."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - (safe - LIFT)[:, None])
    shrink = tl.exp2(top - safe)
    return p, new, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def _mean_step(
    j0, q, factor, top, total, sums, anchor, drift, slants, keys, key_row, others, other_row,
    bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    N: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, AVERAGE: tl.constexpr,
    COLLECT: tl.constexpr, START: tl.constexpr, HIGH: tl.constexpr, LIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    DESCRIPTOR: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tile_of(keys, key_row + j0, N, DP, DESCRIPTOR)
    if START or MASKED or HAS_BIAS or HAS_DECAY:
        s = tile_scores(
            q, k, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low, row_first,
            T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED, PRECISION,
        )
        p, top, total, shrink = _online(s, top, total, LIFT)
    else:  # factors are not negative: the greatest product is that of the greatest score
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new = tl.maximum(top, tl.max(product, 1) * factor)
        p = tl.exp2(product * factor[:, None] - (new - LIFT)[:, None])
        shrink = tl.exp2(top - new)
        top, total = new, total * shrink + tl.sum(p, 1)
    if COLLECT:
        x = k
        if AVERAGE:
            x = tile_of(others, other_row + j0, N, WIDTH, DESCRIPTOR)
        sums = sums * shrink[:, None]
        if HIGH:
            p, rest = split(p, OPERAND)
            sums = tl.dot(rest, x, sums, input_precision=PRECISION)
        sums = tl.dot(p.to(OPERAND), x, sums, input_precision=PRECISION)
    if START:
        # Any constant may be taken off the scores: one that makes their products small.
        anchor = tl.where(anchor == float("-inf"), top, anchor)
        w = p * (s - tl.where(anchor == float("-inf"), 0.0, anchor)[:, None])
        if MASKED or HAS_BIAS:
            w = tl.where(s == float("-inf"), 0.0, w)
        drift = drift * shrink + tl.sum(w, 1)
        slants = tl.dot(w.to(OPERAND), k, slants * shrink[:, None], input_precision=PRECISION)
    return top, total, sums, anchor, drift, slants


@triton.jit
def _shift_of_lse(x, scale, centre, D: tl.constexpr, DP: tl.constexpr):
    """What centring took off the scores of a row, in the natural logarithm."""
    channels = tl.arange(0, DP)
    return scale * tl.sum(x * tl.load(centre + channels)[None, :], 1)


@triton.jit(do_not_specialize=["T", "S", "left", "right", "tiles", "skip", "together", "pairs"])
def mean_kernel(
    q, keys, values, centre, sigma, scale, bias, high, low, first, row_bias, out, mean,
    start_out, top_out, total_out, lse_out, overflow, failed, scratch,
    qb, qh, qt, scale_b, scale_h, row_bias_b, row_bias_h, row_bias_t,
    T, S, length, left, right, tiles, skip, together, pairs,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, AVERAGE: tl.constexpr, COLLECT: tl.constexpr,
    START: tl.constexpr, HIGH: tl.constexpr, HALF: tl.constexpr, OPERAND: tl.constexpr,
    DESCRIPTOR: tl.constexpr, CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_ROW_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """top, total and lse of every row, and its mean key, or with AVERAGE its mean value.

    START: also the covariance of the keys applied to the query, to `start_out`: scores are
    products with the query already, so that it costs one product and saves most of a pass.
    scratch: for operands, M rows of DP for every tile of every head.
    """
    LIFT: tl.constexpr = 6.0 if HALF else 0.0
    WIDTH: tl.constexpr = DVP if AVERAGE else DP
    tile, pair = place(tl.program_id(0), tiles, pairs, together)
    tile += skip
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    i = tile * M + tl.arange(0, M)
    x = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    queries, guard = operand_rows(x, HALF, OPERAND)
    size = tl.load(sigma + key_head * 2)
    scaling = tl.load(scale + b * scale_b + h * scale_h)
    factor = guard * (scaling * LOG2E * size)
    queries = tl.where((factor < 0)[:, None], -queries, queries)
    factor = tl.abs(factor)
    scratch += (pair.to(tl.int64) * tiles + tile) * (M * DP)
    queries = as_loaded(queries, scratch, M, DP)
    key_source, key_row = start_of(keys, key_head, length, DP, DESCRIPTOR)
    value_source, value_row = start_of(values, key_head, length, DVP, DESCRIPTOR)
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
    sums = tl.zeros([M, WIDTH], tl.float32)
    anchor, drift, slants = top, total, total
    if START:
        slants = tl.zeros([M, DP], tl.float32)
    for part in tl.static_range(3):  # cut by the left edge, seen whole, cut by the right edge
        low_end, high_end = part_of(part, start, whole, cut, stop, HAS_LEFT, HAS_DECAY)
        for j0 in tl.range(low_end, high_end, N):
            top, total, sums, anchor, drift, slants = _mean_step(
                j0, queries, factor, top, total, sums, anchor, drift, slants,
                key_source, key_row, value_source, value_row, bias, high, low, i,
                row_high, row_low, row_first, T, S, left, right,
                N, DP, WIDTH, AVERAGE, COLLECT, START, HIGH, LIFT, OPERAND, DESCRIPTOR,
                HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, part != 1, PRECISION,
            )
    some = total > 0
    inverse = tl.where(some, 1.0 / total, 0.0)
    rows = pair.to(tl.int64) * T
    if AVERAGE:
        sums = sums * (inverse * tl.load(sigma + key_head * 2 + 1))[:, None]
        put_rows(out + rows * DV, i, T, sums, DV, DVP)
        if HALF:
            wrong = beyond(overflow + key_head, i, T, S, right, HAS_RIGHT)
            wrong = (wrong | (tl.sum(sums * 0.0, 1) != 0.0)) & some
            tl.store(failed + rows + i, wrong.to(tl.int8), mask=i < T)
    elif COLLECT:
        sums = sums * inverse[:, None]
        put_rows(mean + rows * D, i, T, sums, D, DP)
    if START:
        slants = slants * inverse[:, None] - (drift * inverse)[:, None] * sums
        put_rows(start_out + rows * D, i, T, slants / (scaling * LOG2E * size * size), D, DP)
    total = total * (0.015625 if HALF else 1.0)  # without the lift
    lse = top * LN2 + tl.log(total)
    x = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    lse += _shift_of_lse(x, scaling, centre + key_head * DP, D, DP)
    if HAS_ROW_BIAS:
        place_of = b.to(tl.int64) * row_bias_b + h * row_bias_h + i.to(tl.int64) * row_bias_t
        lse += tl.load(row_bias + place_of, mask=i < T, other=0.0)
    lse = tl.where(some, lse, float("-inf"))
    tl.store(top_out + rows + i, top, mask=i < T)
    tl.store(total_out + rows + i, total, mask=i < T)
    tl.store(lse_out + rows + i, lse, mask=i < T)


@triton.jit
def _output_step(
    j0, both, rest, size, at_zero, factor, base, sums, signed, keys, key_row, values, value_row,
    bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    HIGH: tl.constexpr, OPERAND: tl.constexpr,
    DESCRIPTOR: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tile_of(keys, key_row + j0, N, DP, DESCRIPTOR)
    product, t = two_products(both, k, M, N, PRECISION)
    s = scores_of(
        product, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low, row_first,
        T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED,
    )
    if HIGH:
        t = tl.dot(rest, tl.trans(k), t, input_precision=PRECISION)
    w = tl.exp2(s - base[:, None]) * (at_zero[:, None] - size[:, None] * t)
    if MASKED:  # 0 times a later key's product may be no 0
        w = tl.where(s == float("-inf"), 0.0, w)
    signed += tl.sum(w, 1)
    v = tile_of(values, value_row + j0, N, DVP, DESCRIPTOR)
    return tl.dot(w.to(OPERAND), v, sums, input_precision=PRECISION), signed


@triton.jit(do_not_specialize=["T", "S", "left", "right", "tiles", "skip", "together", "pairs"])
def output_kernel(
    q, keys, values, sigma, scale, bias, high, low, first,
    slope, mean, top_in, total_in, out, failed, scratch,
    qb, qh, qt, scale_b, scale_h,
    T, S, length, left, right, tiles, skip, together, pairs,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, INTERCEPT: tl.constexpr,
    HIGH: tl.constexpr, HALF: tl.constexpr, OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):
    """The outputs, with g solved; rows that come out as no number are marked as failed.

    scratch: for operands, 2 M rows of DP for every tile of every head.
    """
    LIFT: tl.constexpr = 6.0 if HALF else 0.0
    tile, pair = place(tl.program_id(0), tiles, pairs, together)
    tile += skip
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    rows = pair.to(tl.int64) * T
    i = tile * M + tl.arange(0, M)
    x = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    queries, guard = operand_rows(x, HALF, OPERAND)
    sigma_k = tl.load(sigma + key_head * 2)
    factor = guard * (tl.load(scale + b * scale_b + h * scale_h) * LOG2E * sigma_k)
    g = raw_rows(slope + rows * D, i, D, T, D, DP) * sigma_k
    size = tl.sqrt(tl.sum(g * g, 1))
    g = g * tl.where(size > 0, 1.0 / size, 0.0)[:, None]
    g_high, rest = split(g, OPERAND)
    scratch += (pair.to(tl.int64) * tiles + tile) * (2 * M * DP)
    both = stacked(queries, g_high, scratch, M, DP)
    # The rounded g is g from here on: its product with the mean has the same rounding.
    used = g_high.to(tl.float32)
    if HIGH:
        used += rest.to(tl.float32)
    if INTERCEPT:
        kbar = raw_rows(mean + rows * D, i, D, T, D, DP)
        at_zero = 1.0 + size * tl.sum(used * kbar, 1)
    else:
        at_zero = size * 0.0
    live = i < T
    top = tl.load(top_in + rows + i, mask=live, other=float("-inf"))
    total = tl.load(total_in + rows + i, mask=live, other=0.0)
    base = tl.where(top == float("-inf"), 0.0, top) - LIFT
    key_source, key_row = start_of(keys, key_head, length, DP, DESCRIPTOR)
    value_source, value_row = start_of(values, key_head, length, DVP, DESCRIPTOR)
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
    sums = tl.zeros([M, DVP], tl.float32)
    signed = tl.zeros([M], tl.float32)
    for part in tl.static_range(3):  # cut by the left edge, seen whole, cut by the right edge
        low_end, high_end = part_of(part, start, whole, cut, stop, HAS_LEFT, HAS_DECAY)
        for j0 in tl.range(low_end, high_end, N):
            sums, signed = _output_step(
                j0, both, rest, size, at_zero, factor, base, sums, signed,
                key_source, key_row, value_source, value_row, bias, high, low, i,
                row_high, row_low, row_first, T, S, left, right, M, N, DP, DVP, HIGH, OPERAND,
                DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, part != 1, PRECISION,
            )
    weight = total * (64.0 if HALF else 1.0)
    off = signed * 0.0
    if INTERCEPT:
        # The signed weights sum to the total but for rounding: so constants come back exactly.
        off = tl.abs(signed - weight) / weight
        weight = tl.where(off < 0.5, signed, weight)
    inverse = tl.where(total > 0, 1.0 / weight, 0.0)
    o = sums * (inverse * tl.load(sigma + key_head * 2 + 1))[:, None]
    # The rounding of the mean, multiplied by g, is seen here; so are inf and NaN.
    wrong = ~(off < NOISE) | (tl.sum(o * 0.0, 1) != 0.0)
    wrong = wrong & (total > 0)
    tl.store(failed + rows + i, tl.full([M], 1, tl.int8), mask=live & wrong)
    put_rows(out + rows * DV, i, T, o, DV, DVP)
