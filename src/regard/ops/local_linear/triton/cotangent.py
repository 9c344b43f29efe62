"""The first pass of the backward: what the gradient of the output asks of the solve.

    gamma_j = e . v_j,     right = sum_j p_j (gamma_j - sum_l p_l gamma_l) k_j

(C + lambda I)^-1 multiplies errors of `right` most, so the weights p gamma go into that product
as the sum of two short floats. Rows of e are divided by a power of two first, so that all are of
one size; every later quantity of a row is for that e, and `guard` puts it back.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of, power_of_two
from regard.ops.local_linear.triton.forward import LOG2E, tile_scores
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

# The `top` of a row that takes no part: above any score, so that all its weights are 0.
DEAD = tl.constexpr(3e38)


@triton.jit
def _step(
    j0, acc, other, mean_gamma,
    q, e, g, g_rest, at_mean, factor, base, keys, key_row, values, value_row,
    bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, OPERAND: tl.constexpr,
    DESCRIPTOR: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr, MEAN: tl.constexpr, REFINE: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Adds a tile of keys to the three sums."""
    k = tile_of(keys, key_row + j0, N, DP, DESCRIPTOR)
    v = tile_of(values, value_row + j0, N, DVP, DESCRIPTOR)
    s = tile_scores(
        q, k, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low, row_first,
        T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED, PRECISION,
    )
    p = tl.exp2(s - base[:, None])
    w = p * tl.dot(e, tl.trans(v), input_precision=PRECISION)
    if MASKED:  # 0 times a later key's product may be no 0
        w = tl.where(s == float("-inf"), 0.0, w)
    mean_gamma += tl.sum(w, 1)
    if SOLVE:
        if HIGH:
            w, w_rest = split(w, OPERAND)
            acc = tl.dot(w_rest, k, acc, input_precision=PRECISION)
        acc = tl.dot(w.to(OPERAND), k, acc, input_precision=PRECISION)
    if MEAN:
        if HIGH:
            p, p_rest = split(p, OPERAND)
            other = tl.dot(p_rest, k, other, input_precision=PRECISION)
        other = tl.dot(p.to(OPERAND), k, other, input_precision=PRECISION)
    if REFINE:
        t = tl.dot(g, tl.trans(k), input_precision=PRECISION)
        if HIGH:
            t = tl.dot(g_rest, tl.trans(k), t, input_precision=PRECISION)
        t = p * (t - at_mean[:, None])
        if MASKED:
            t = tl.where(s == float("-inf"), 0.0, t)
        other = tl.dot(t.to(OPERAND), k, other, input_precision=PRECISION)
    return acc, other, mean_gamma


@triton.jit(do_not_specialize=["T", "S", "left", "right", "tiles", "together", "pairs"])
def cotangent_kernel(
    q, keys, values, grad, centre, sigma, scale, ridge, bias, high, low, first,
    mean, top_in, total_in, lse_in, slope,
    e_rows, guard_out, gamma_out, x_out, r_out, goal_out, g_out, rest_out, goal_g_out,
    qb, qh, qt, eb, eh, et, scale_b, scale_h, ridge_b, ridge_h, ridge_t,
    T, S, length, row_length, left, right, tiles, together, pairs,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, INTERCEPT: tl.constexpr, ABSOLUTE: tl.constexpr,
    SOLVE: tl.constexpr, MEAN: tl.constexpr, REFINE: tl.constexpr, HIGH: tl.constexpr,
    HALF: tl.constexpr, OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Rows of e as operands, the mean of gamma; with SOLVE the right side r, its norm, x = 0.

    MEAN: also kbar, into `rest_out`. REFINE: also what is left of m - (C + lambda I) g, from
    which the solve for g goes on, and |m|. All in the coordinates of the prepared keys. A row
    without a gradient or without a key takes no part, whatever it holds: its guard is 0.
    """
    tile, pair = place(tl.program_id(0), tiles, pairs, together)
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    rows = pair.to(tl.int64) * T
    i = tile * M + tl.arange(0, M)
    inside = i < T
    e = raw_rows(grad + b.to(tl.int64) * eb + h.to(tl.int64) * eh, i, et, T, DV, DVP)
    lse = tl.load(lse_in + rows + i, mask=inside, other=float("-inf"))
    live = (tl.max((e != 0).to(tl.int32), 1) > 0) & (lse > float("-inf"))
    e, guard = operand_rows(tl.where(live[:, None], e, 0.0), HALF, OPERAND)
    padded = pair.to(tl.int64) * row_length + i
    value_channels = tl.arange(0, DVP)
    tl.store(e_rows + (padded * DVP)[:, None] + value_channels[None, :], e)
    tl.store(guard_out + padded, tl.where(live, guard, 0.0))

    raw = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    raw = tl.where(live[:, None], raw, 0.0)
    queries, q_guard = operand_rows(raw, HALF, OPERAND)
    sigma_k = tl.load(sigma + key_head * 2)
    factor = q_guard * (tl.load(scale + b * scale_b + h * scale_h) * LOG2E * sigma_k)
    top = tl.load(top_in + rows + i, mask=inside, other=0.0)
    total = tl.load(total_in + rows + i, mask=inside, other=1.0)
    base = tl.where(live, top, DEAD)
    inverse = tl.where(live, 1.0 / tl.where(live, total, 1.0), 0.0)
    kbar = tl.zeros([M, DP], tl.float32)
    if INTERCEPT and SOLVE and not MEAN:
        kbar = tl.where(live[:, None], raw_rows(mean + rows * D, i, D, T, D, DP), 0.0)
    g = queries
    g_rest = queries
    size = base
    at_mean = base
    if REFINE:
        start_g = raw_rows(slope + rows * D, i, D, T, D, DP) * sigma_k
        start_g = tl.where(live[:, None], start_g, 0.0)
        size = power_of_two(tl.max(tl.abs(start_g), 1))
        start_g = start_g * (1.0 / size)[:, None]
        g, g_rest = split(start_g, OPERAND)
        at_mean = tl.sum(start_g * kbar, 1)

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
    acc = tl.zeros([M, DP], tl.float32)
    other = tl.zeros([M, DP], tl.float32)
    mean_gamma = tl.zeros([M], tl.float32)
    if HAS_LEFT or HAS_DECAY:
        for j0 in tl.range(start, whole, N):
            acc, other, mean_gamma = _step(
                j0, acc, other, mean_gamma, queries, e, g, g_rest, at_mean, factor, base,
                key_source, key_row, value_source, value_row, bias, high, low, i,
                row_high, row_low, row_first, T, S, left, right, N, DP, DVP, OPERAND,
                DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, True, PRECISION,
                SOLVE, MEAN, REFINE, HIGH,
            )
    for j0 in tl.range(whole, cut, N):
        acc, other, mean_gamma = _step(
            j0, acc, other, mean_gamma, queries, e, g, g_rest, at_mean, factor, base,
            key_source, key_row, value_source, value_row, bias, high, low, i,
            row_high, row_low, row_first, T, S, left, right, N, DP, DVP, OPERAND,
            DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, False, PRECISION,
            SOLVE, MEAN, REFINE, HIGH,
        )
    for j0 in tl.range(cut, stop, N):
        acc, other, mean_gamma = _step(
            j0, acc, other, mean_gamma, queries, e, g, g_rest, at_mean, factor, base,
            key_source, key_row, value_source, value_row, bias, high, low, i,
            row_high, row_low, row_first, T, S, left, right, N, DP, DVP, OPERAND,
            DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, True, PRECISION,
            SOLVE, MEAN, REFINE, HIGH,
        )

    mean_gamma = mean_gamma * inverse
    if not INTERCEPT:
        mean_gamma = tl.zeros([M], tl.float32)
    tl.store(gamma_out + padded, mean_gamma)
    if MEAN:
        kbar = other * inverse[:, None]
        put_rows(rest_out + rows * D, i, T, kbar, D, DP)
    elif INTERCEPT and SOLVE:  # again: there are no registers to keep it in over the loop
        kbar = tl.where(live[:, None], raw_rows(mean + rows * D, i, D, T, D, DP), 0.0)
    if SOLVE:
        t = acc * inverse[:, None] - mean_gamma[:, None] * kbar
        put_rows(r_out + rows * D, i, T, t, D, DP)
        put_rows(x_out + rows * D, i, T, t * 0.0, D, DP)
        tl.store(goal_out + rows + i, tl.sqrt(tl.sum(t * t, 1)), mask=inside)
    if REFINE:
        channels = tl.arange(0, DP)
        middle = tl.load(centre + key_head * DP + channels)[None, :]  # 0 without an intercept
        raw = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
        shift = kbar - (raw - middle) * (1.0 / sigma_k)
        shift = tl.where(live[:, None] & (channels < D)[None, :], shift, 0.0)
        at_ridge = b * ridge_b + h * ridge_h + i.to(tl.int64) * ridge_t
        strength = tl.load(ridge + at_ridge, mask=inside, other=0.0) / (sigma_k * sigma_k)
        if ABSOLUTE:
            strength *= tl.exp(-tl.where(live, lse, 0.0))
        start_g = raw_rows(slope + rows * D, i, D, T, D, DP) * sigma_k
        start_g = tl.where(live[:, None], start_g, 0.0)
        rest = shift - other * (inverse * size)[:, None] - strength[:, None] * start_g
        put_rows(g_out + rows * D, i, T, start_g, D, DP)
        put_rows(rest_out + rows * D, i, T, rest, D, DP)
        tl.store(goal_g_out + rows + i, tl.sqrt(tl.sum(shift * shift, 1)), mask=inside)
