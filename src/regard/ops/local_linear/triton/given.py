"""One pass for a g that is given, as in Parallax: the output with two accumulators.

    o = (1 + g . kbar) sum p v / total - sum p t v / total,    t = g . k
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.local_linear.triton.forward import (
    LN2,
    LOG2E,
    _online,
    _shift_of_lse,
    scores_of,
    stacked,
    two_products,
)
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


@triton.jit
def _given_step(
    j0, both, factor, top, total, drift, sums, slants, keys, key_row, values, value_row,
    bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, LIFT: tl.constexpr,
    OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    k = tile_of(keys, key_row + j0, N, DP, DESCRIPTOR)
    product, t = two_products(both, k, M, N, PRECISION)
    s = scores_of(
        product, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low, row_first,
        T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED,
    )
    p, top, total, shrink = _online(s, top, total, LIFT)
    w = p * t
    if MASKED:
        w = tl.where(s == float("-inf"), 0.0, w)
    short = w.to(OPERAND)
    if MASKED:  # rows that see few keys are here: as the product sees them, weights sum to 1
        w = short.to(tl.float32)
    drift = drift * shrink + tl.sum(w, 1)
    v = tile_of(values, value_row + j0, N, DVP, DESCRIPTOR)
    sums = tl.dot(p.to(OPERAND), v, sums * shrink[:, None], input_precision=PRECISION)
    slants = tl.dot(short, v, slants * shrink[:, None], input_precision=PRECISION)
    return top, total, drift, sums, slants


@triton.jit(do_not_specialize=["T", "S", "left", "right", "tiles", "together", "pairs"])
def given_kernel(
    q, keys, values, centre, sigma, scale, bias, high, low, first, row_bias,
    probe, out, top_out, total_out, lse_out, overflow, failed, scratch,
    qb, qh, qt, gb, gh, gt, scale_b, scale_h, row_bias_b, row_bias_h, row_bias_t,
    T, S, length, left, right, tiles, together, pairs,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, INTERCEPT: tl.constexpr,
    HALF: tl.constexpr, OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_ROW_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, top, total and lse with g given."""
    LIFT: tl.constexpr = 6.0 if HALF else 0.0
    tile, pair = place(tl.program_id(0), tiles, pairs, together)
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    i = tile * M + tl.arange(0, M)
    x = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    queries, guard = operand_rows(x, HALF, OPERAND)
    sigma_k = tl.load(sigma + key_head * 2)
    scaling = tl.load(scale + b * scale_b + h * scale_h)
    factor = guard * (scaling * LOG2E * sigma_k)
    g = raw_rows(probe + b.to(tl.int64) * gb + h.to(tl.int64) * gh, i, gt, T, D, DP) * sigma_k
    size = tl.sqrt(tl.sum(g * g, 1))
    g = (g * tl.where(size > 0, 1.0 / size, 0.0)[:, None]).to(OPERAND)
    scratch += (pair.to(tl.int64) * tiles + tile) * (2 * M * DP)
    both = stacked(queries, g, scratch, M, DP)
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
    drift = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, DVP], tl.float32)
    slants = tl.zeros([M, DVP], tl.float32)
    for part in tl.static_range(3):  # cut by the left edge, seen whole, cut by the right edge
        low_end, high_end = part_of(part, start, whole, cut, stop, HAS_LEFT, HAS_DECAY)
        for j0 in tl.range(low_end, high_end, N):
            top, total, drift, sums, slants = _given_step(
                j0, both, factor, top, total, drift, sums, slants, key_source, key_row,
                value_source, value_row, bias, high, low, i, row_high, row_low, row_first,
                T, S, left, right, M, N, DP, DVP, LIFT, OPERAND, DESCRIPTOR,
                HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, part != 1, PRECISION,
            )
    some = total > 0
    inverse = tl.where(some, 1.0 / total, 0.0)
    rows = pair.to(tl.int64) * T
    at_zero = size * 0.0
    if INTERCEPT:
        at_zero = 1.0 + size * drift * inverse
    o = sums * (at_zero * inverse)[:, None] - slants * (size * inverse)[:, None]
    o = o * tl.load(sigma + key_head * 2 + 1)
    put_rows(out + rows * DV, i, T, o, DV, DVP)
    if HALF:
        wrong = beyond(overflow + key_head, i, T, S, right, HAS_RIGHT)
        wrong = (wrong | (tl.sum(o * 0.0, 1) != 0.0)) & some
        tl.store(failed + rows + i, wrong.to(tl.int8), mask=i < T)
    total = total * (0.015625 if HALF else 1.0)
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
