"""The second pass of the backward, over the keys of each query: dq, ridge, scale, and row data.

With a_j = g . (k_j - kbar), b_j = u . (k_j - kbar), of which the constants at k = 0 are row data:

    G_j = (1 - a_j)(gamma_j - b_j),    dS_j = p_j (G_j + base),    dq = u + scale sum_j dS_j k_j

The rows of dS sum to zero (scores may be shifted), so base is minus the sum of p_j G_j, which
equals lambda g . u for exact g and u, and is right for others too. It is known after the loop
only, where kbar stands for the sum that it would have been multiplied with.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.local_linear.triton.conjugate import EPSILON, NOISE
from regard.ops.local_linear.triton.cotangent import DEAD
from regard.ops.local_linear.triton.forward import (
    LOG2E,
    scores_of,
    stacked,
    tile_scores,
    two_products,
)
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


@triton.jit
def _step(
    j0, acc, total,
    q, e, u, at_zero, rest_at_zero, constant, shrink, factor, base,
    keys, key_row, values, value_row,
    bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, SLOPE: tl.constexpr, SOLVED: tl.constexpr,
):
    """Adds a tile of keys to sum_j dS_j k_j and to sum_j dS_j (times the sum of the weights)."""
    k = tile_of(keys, key_row + j0, N, DP, DESCRIPTOR)
    v = tile_of(values, value_row + j0, N, DVP, DESCRIPTOR)
    if SLOPE:  # of queries and slopes
        product, slant = two_products(q, k, M, N, PRECISION)
        s = scores_of(
            product, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low,
            row_first, T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED,
        )
    else:
        s = tile_scores(
            q, k, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low, row_first,
            T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED, PRECISION,
        )
    rest = tl.dot(e, tl.trans(v), input_precision=PRECISION)
    if SOLVED:
        rest = tl.dot(u, tl.trans(k), rest, input_precision=PRECISION)
    rest += rest_at_zero[:, None]
    if SLOPE:
        rest *= slant + at_zero[:, None]
    ds = tl.exp2(s - base[:, None]) * (rest + constant[:, None])
    if MASKED:  # 0 times a later key's product may be no 0
        ds = tl.where(s == float("-inf"), 0.0, ds)
    total += tl.sum(ds, 1)
    ds = (ds * shrink[:, None]).to(OPERAND)
    return tl.dot(ds, k, acc, input_precision=PRECISION), total


@triton.jit(do_not_specialize=["T", "S", "left", "right", "tiles", "together", "pairs"])
def queries_kernel(
    q, keys, values, centre, sigma, scale, ridge, bias, high, low, first,
    mean, top_in, total_in, lse_in, slope, solution, failed_g, failed, right_side, overflow,
    e_rows, guard_in, gamma_in,
    grad_q, grad_ridge, grad_scale, grad_row, grad_probe,
    q_rows, u_rows, row_data, bounds, scratch,
    qb, qh, qt, scale_b, scale_h, ridge_b, ridge_h, ridge_t,
    T, S, length, row_length, left, right, tiles, together, pairs,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    INTERCEPT: tl.constexpr, ABSOLUTE: tl.constexpr,
    SLOPE: tl.constexpr, SOLVED: tl.constexpr, REFINED: tl.constexpr,
    BALANCED: tl.constexpr, CONSTANT: tl.constexpr, RESCUED: tl.constexpr, LOOP: tl.constexpr,
    LIMIT: tl.constexpr, HALF: tl.constexpr, OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of the queries' side, and what the pass over the queries of each key needs.

    SLOPE: g is not 0; SOLVED: and depends on the keys; REFINED: and was solved for again.
    BALANCED: rows of dS are made to sum to zero; CONSTANT: they sum to -lambda g . u (absolute
    ridge, frozen). RESCUED: rows that failed take no part (otherwise they give what they have,
    and NaN if they see a key beyond the range of float16). LOOP: False where only the gradient of
    the values is wanted.

    row_data [4, B H, rows]: 1 - a and gamma - b at k = 0, base, and the logarithm of what divides
    exp2(s). q_rows: q, or with SLOPE ROWS rows of q and as many of -g in turns. u_rows: -u.
    bounds [2, B H, tiles]: of the size of what a tile contributes to values and to keys. scratch:
    as in `output_kernel`.
    """
    tile, pair = place(tl.program_id(0), tiles, pairs, together)
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    rows = pair.to(tl.int64) * T
    i = tile * M + tl.arange(0, M)
    inside = i < T
    padded = pair.to(tl.int64) * row_length + i
    channels = tl.arange(0, DP)
    value_channels = tl.arange(0, DVP)
    # The first pass wrote rows of e, guard and gamma, in tiles of its own: none beyond T is sure.
    guard = tl.load(guard_in + padded, mask=inside, other=0.0)
    live = guard > 0
    sigma_k, sigma_v = tl.load(sigma + key_head * 2), tl.load(sigma + key_head * 2 + 1)
    middle = tl.load(centre + key_head * DP + channels)[None, :]
    raw = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    raw = tl.where(live[:, None], raw, 0.0)
    kbar = tl.zeros([M, DP], tl.float32)
    if SLOPE and INTERCEPT:
        kbar = raw_rows(mean + rows * D, i, D, T, D, DP)
    g = kbar
    u = kbar
    if SLOPE:
        g = raw_rows(slope + rows * D, i, D, T, D, DP)
        if not REFINED:  # as the forward left it, in the original coordinates
            g = g * sigma_k
    if SOLVED:
        u = raw_rows(solution + rows * D, i, D, T, D, DP)
    if SOLVED and RESCUED:
        bad = tl.load(failed + rows + i, mask=inside, other=0) != 0
        if REFINED:
            bad |= tl.load(failed_g + rows + i, mask=inside, other=0) != 0
        shift = tl.where((channels < D)[None, :], kbar - (raw - middle) * (1.0 / sigma_k), 0.0)
        norms = tl.sqrt(tl.sum(kbar * kbar, 1)) + tl.sqrt(tl.sum(shift * shift, 1))
        bad |= ~(EPSILON * tl.sqrt(tl.sum(g * g, 1)) * norms < NOISE)
        if HALF:
            bad |= ~(tl.max(tl.maximum(tl.abs(g), tl.abs(u)), 1) < LIMIT)
        tl.store(failed + rows + i, (bad & live).to(tl.int8), mask=inside)
        live &= ~bad
        guard = tl.where(live, guard, 0.0)
        raw = tl.where(live[:, None], raw, 0.0)
    if HALF and not RESCUED:  # what is beyond the range of float16 gives no number, not a wrong one
        last = tl.zeros([M], tl.int32) + (S - 1)
        if HAS_RIGHT:
            last = tl.minimum(last, i + (S - T) + right)
        cut_off = live & (last >= tl.load(overflow + key_head))
        guard = tl.where(cut_off, float("nan"), guard)
    kbar = tl.where(live[:, None], kbar, 0.0)
    queries, q_guard = operand_rows(raw, HALF, OPERAND)
    if HALF:
        raw = tl.minimum(tl.maximum(raw, -LIMIT), LIMIT)
    placed = padded // ROWS * (2 * ROWS) + padded % ROWS if SLOPE else padded
    tl.store(q_rows + (placed * DP)[:, None] + channels[None, :], raw.to(OPERAND))
    top = tl.load(top_in + rows + i, mask=inside, other=0.0)
    total_of_row = tl.load(total_in + rows + i, mask=inside, other=1.0)
    base = tl.where(live, top, DEAD)
    inverse = tl.where(live, 1.0 / tl.where(live, total_of_row, 1.0), 0.0)

    at_zero = tl.zeros([M], tl.float32) + 1.0
    rest_at_zero = tl.where(live, -tl.load(gamma_in + padded), 0.0)
    bound_g = tl.zeros([M], tl.float32) + 1.0
    bound_u = bound_g
    agreement = tl.zeros([M], tl.float32)
    g_short = queries
    u_short = queries
    # Negative, as both are subtracted. The rounded ones are used throughout: so the errors of
    # their products with keys and with kbar cancel.
    if SLOPE:
        g = tl.where(live[:, None], g, 0.0)
        g_short = (-g).to(OPERAND)
        at_zero = -tl.sum(g_short.to(tl.float32) * kbar, 1)
        if INTERCEPT:
            at_zero += 1.0
        bound_g += tl.max(tl.abs(g), 1)
        tl.store(q_rows + ((placed + ROWS) * DP)[:, None] + channels[None, :], g_short)
    if SOLVED:
        u = tl.where(live[:, None], u, 0.0)
        u_short = (-u).to(OPERAND)
        rest_at_zero -= tl.sum(u_short.to(tl.float32) * kbar, 1)
        bound_u += tl.max(tl.abs(u), 1)
        tl.store(u_rows + (padded * DP)[:, None] + channels[None, :], u_short)
        agreement = tl.sum(g * u, 1)
    relief = tl.zeros([M], tl.float32) + 1.0 / (sigma_k * sigma_k)
    if ABSOLUTE:
        lse = tl.load(lse_in + rows + i, mask=inside, other=0.0)
        relief *= tl.exp(-tl.where(live, lse, 0.0))
    row_sum = tl.zeros([M], tl.float32)
    if SOLVED:
        at_ridge = b * ridge_b + h * ridge_h + i.to(tl.int64) * ridge_t
        strength = tl.load(ridge + at_ridge, mask=inside, other=0.0) * relief
        row_sum = strength * agreement
    constant = tl.zeros([M], tl.float32)
    if not (BALANCED or CONSTANT):
        constant = row_sum
    own = bound_g * bound_u

    if LOOP:
        e = tl.load(e_rows + (padded * DVP)[:, None] + value_channels[None, :])
        scaling = tl.load(scale + b * scale_b + h * scale_h)
        factor = q_guard * (scaling * LOG2E * sigma_k)
        shrink = 1.0 / own
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
        if SLOPE:  # by way of memory, and so is u: see `as_loaded`
            scratch += (pair.to(tl.int64) * tiles + tile) * (2 * M * DP)
            queries = stacked(queries, g_short, scratch, M, DP)
        if SOLVED:
            u_short = tl.load(u_rows + (padded * DP)[:, None] + channels[None, :])
        acc = tl.zeros([M, DP], tl.float32)
        total = tl.zeros([M], tl.float32)
        if HAS_LEFT or HAS_DECAY:
            for j0 in tl.range(start, whole, N):
                acc, total = _step(
                    j0, acc, total, queries, e, u_short, at_zero,
                    rest_at_zero, constant, shrink, factor, base, key_source, key_row,
                    value_source, value_row, bias, high, low, i, row_high, row_low, row_first,
                    T, S, left, right, M, N, DP, DVP, OPERAND, DESCRIPTOR, HAS_LEFT, HAS_RIGHT,
                    HAS_BIAS, HAS_DECAY, True, PRECISION, SLOPE, SOLVED,
                )
        for j0 in tl.range(whole, cut, N):
            acc, total = _step(
                j0, acc, total, queries, e, u_short, at_zero,
                rest_at_zero, constant, shrink, factor, base, key_source, key_row,
                value_source, value_row, bias, high, low, i, row_high, row_low, row_first,
                T, S, left, right, M, N, DP, DVP, OPERAND, DESCRIPTOR, HAS_LEFT, HAS_RIGHT,
                HAS_BIAS, HAS_DECAY, False, PRECISION, SLOPE, SOLVED,
            )
        for j0 in tl.range(cut, stop, N):
            acc, total = _step(
                j0, acc, total, queries, e, u_short, at_zero,
                rest_at_zero, constant, shrink, factor, base, key_source, key_row,
                value_source, value_row, bias, high, low, i, row_high, row_low, row_first,
                T, S, left, right, M, N, DP, DVP, OPERAND, DESCRIPTOR, HAS_LEFT, HAS_RIGHT,
                HAS_BIAS, HAS_DECAY, True, PRECISION, SLOPE, SOLVED,
            )
        through = acc * (inverse * own)[:, None]  # sum_j dS_j k'_j
        # Rows are read again: there are no registers to keep them in over the loop.
        if BALANCED:
            constant = -total * inverse
            kbar = raw_rows(mean + rows * D, i, D, T, D, DP)
            through += tl.where(live[:, None], constant[:, None] * kbar, 0.0)
        through *= sigma_k
        size = guard * sigma_v
        if CONSTANT:  # what the centring had taken off the scores
            through -= row_sum[:, None] * middle
            tl.store(grad_row + rows + i, -row_sum * size, mask=inside)
        raw = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
        raw = tl.where(live[:, None], raw, 0.0)
        tl.store(grad_scale + rows + i, tl.sum(raw * through, 1) * size, mask=inside)
        of_query = scaling * through
        if SOLVED:
            u = raw_rows(solution + rows * D, i, D, T, D, DP)
            of_query += tl.where(live[:, None], u, 0.0) * (1.0 / sigma_k)
        put_rows(grad_q + rows * D, i, T, of_query * size[:, None], D, DP)
        tl.store(grad_ridge + rows + i, agreement * relief * size, mask=inside)
        if SLOPE and not SOLVED:
            t = raw_rows(right_side + rows * D, i, D, T, D, DP)
            put_rows(grad_probe + rows * D, i, T, t * (-size * sigma_k)[:, None], D, DP)

    stride = tl.cast(pairs, tl.int64) * row_length
    tl.store(row_data + padded, at_zero)
    tl.store(row_data + stride + padded, rest_at_zero)
    tl.store(row_data + 2 * stride + padded, constant)
    divisor = base - tl.log2(tl.where(live, inverse * guard, 1.0))
    tl.store(row_data + 3 * stride + padded, divisor)
    at = pair * tiles + tile
    tl.store(bounds + at, tl.max(guard * bound_g, 0))
    tl.store(bounds + pairs * tiles + at, tl.max(guard * own, 0))
