"""Conjugate gradients on the systems (C + lambda I) x = b of a tile of queries, in one kernel.

One pass over the keys makes one step for all rows of a tile; the tile stops when all its rows
have. Between passes x and r lie in memory, not in registers: they would take the place of a
second and a third program on a processor. For a direction ph (a row, its norm 1)

    c = ph . kbar;   y = sum_j p_j (ph . k_j - c) k_j + lambda ph;   a = (r . ph) / (ph . y)
    x += a ph;   r -= a y;   p = r - ((r . y) / (ph . y)) ph;   ph = p / |p|, rounded

The rounded direction is the direction everywhere, so that its rounding costs nothing. c is
taken off before the product is weighed and rounded: after, the error would be tens of times as
large. When a row stops, x += (its smallest step) r halves its error for no product: steps are
at least 1 / (largest eigenvalue).
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.local_linear.triton.forward import LOG2E, scores_of, two_products
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
    state_rows,
    tile_of,
)

# Weights p (1 - g . (k - kbar)) may carry this much rounding, as |g| times that of the keys.
NOISE = tl.constexpr(1e-3)
LARGEST = tl.constexpr(1e30)
EPSILON = tl.constexpr(1.1920929e-07)


@triton.jit
def _step(
    j0, both, c, factor, base, sums, keys, key_row,
    bias, high, low, i, row_high, row_low, row_first, T, S, left, right,
    M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr,
    DESCRIPTOR: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    k = tile_of(keys, key_row + j0, N, DP, DESCRIPTOR)
    product, t = two_products(both, k, M, N, PRECISION)
    s = scores_of(
        product, factor, j0 + tl.arange(0, N), bias, high, low, i, row_high, row_low, row_first,
        T, S, left, right, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, MASKED,
    )
    if MASKED:  # 0 times a later key's product may be no 0: it is made finite
        t = tl.minimum(tl.maximum(t, -LARGEST), LARGEST)
    w = tl.exp2(s - base[:, None]) * (t - c[:, None])
    return tl.dot(w.to(OPERAND), k, sums, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "T", "S", "left", "right", "tiles", "together", "pairs", "limit", "tol",
    ]
)  # fmt: skip
def conjugate_kernel(
    q, keys, centre, sigma, overflow, scale, ridge, bias, high, low, first,
    mean, top_in, total_in, lse_in, goal, x_io, r_io, both_io, iterations, residual, failed,
    qb, qh, qt, scale_b, scale_h, ridge_b, ridge_h, ridge_t,
    T, S, length, left, right, tiles, together, pairs, tol, limit,
    H: tl.constexpr, HK: tl.constexpr, BIAS_HEADS: tl.constexpr, DECAY_HEADS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STARTED: tl.constexpr, FROM_QUERY: tl.constexpr,
    ABSOLUTE: tl.constexpr, INTERCEPT: tl.constexpr,
    HALF: tl.constexpr, OPERAND: tl.constexpr, DESCRIPTOR: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):
    """x [B, H, T, D] for the right side b = kbar - q, from x = 0 (not STARTED).

    FROM_QUERY: r holds the covariance applied to q, and x starts along q.
    STARTED: x and r = b - A x are given, in the coordinates of the prepared keys, and goal =
    |b|. x leaves in the original coordinates (divided by sigma) without STARTED, else as it came.
    """
    LIFT: tl.constexpr = 6.0 if HALF else 0.0
    tile, pair = place(tl.program_id(0), tiles, pairs, together)
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    rows = pair.to(tl.int64) * T
    i = tile * M + tl.arange(0, M)
    live = i < T
    x_io += rows * D
    r_io += rows * D
    # Queries and directions of a tile lie together, as one operand of a product.
    together_at = (pair.to(tl.int64) * tiles + tile) * (2 * M * DP)
    both_at = both_io + together_at + (tl.arange(0, 2 * M) * DP)[:, None]
    both_at += tl.arange(0, DP)[None, :]
    square = (tl.arange(0, M) * DP)[:, None] + tl.arange(0, DP)[None, :]
    ph_at = both_io + together_at + M * DP + square
    mean += rows * D
    raw = raw_rows(q + b.to(tl.int64) * qb + h.to(tl.int64) * qh, i, qt, T, D, DP)
    queries, guard = operand_rows(raw, HALF, OPERAND)
    sigma_k = tl.load(sigma + key_head * 2)
    tl.store(both_io + together_at + square, queries)
    factor = guard * (tl.load(scale + b * scale_b + h * scale_h) * LOG2E * sigma_k)
    top = tl.load(top_in + rows + i, mask=live, other=float("-inf"))
    total = tl.load(total_in + rows + i, mask=live, other=0.0)
    base = tl.where(top == float("-inf"), 0.0, top) - LIFT
    some = total > 0
    inverse = tl.where(some, (0.015625 if HALF else 1.0) / total, 0.0)
    at = b * ridge_b + h * ridge_h + i.to(tl.int64) * ridge_t
    shift = tl.load(ridge + at, mask=live, other=1.0)
    if ABSOLUTE:
        lse = tl.load(lse_in + rows + i, mask=live, other=0.0)
        shift = shift * tl.exp(-tl.where(some, lse, 0.0))
    shift = shift / (sigma_k * sigma_k)

    # The first direction is the residual.
    smallest = tl.full([M], float("inf"), tl.float32)
    if STARTED:
        r = state_rows(r_io, i, T, D, DP)
        size = tl.sum(r * r, 1)
        whole = tl.load(goal + rows + i, mask=live, other=0.0)
        whole = whole * whole
        norms = size * 0.0
    else:
        channels = tl.arange(0, DP)
        middle = tl.load(centre + key_head * DP + channels)[None, :]
        r = -(raw - middle) * (1.0 / sigma_k)
        r = tl.where(channels[None, :] < D, r, 0.0)
        norms = tl.zeros([M], tl.float32)
        if INTERCEPT:
            kbar = state_rows(mean, i, T, D, DP)
            norms = tl.sqrt(tl.sum(kbar * kbar, 1))
            r += kbar
        r = tl.where((some & live)[:, None], r, 0.0)
        whole = tl.sum(r * r, 1)
        size = whole
        if FROM_QUERY:
            # x = c q with the c that is best for it; the curvature along q is known now.
            query = raw * (1.0 / sigma_k)
            applied = state_rows(r_io, i, T, D, DP) + shift[:, None] * query
            along = tl.sum(query * applied, 1)
            usual = (along > 0) & (along < float("inf"))
            c = tl.where(usual, tl.sum(query * r, 1) / along, 0.0)
            smallest = tl.where(usual, tl.sum(query * query, 1) / along, smallest)
            r = tl.where(usual[:, None], r - c[:, None] * applied, r)
            size = tl.where(usual, tl.sum(r * r, 1), size)
            put_rows(x_io, i, T, c[:, None] * query, D, DP)
        else:
            put_rows(x_io, i, T, r * 0.0, D, DP)
        put_rows(r_io, i, T, r, D, DP)
    limit_of = whole * (tol * tol)
    active = (size > limit_of) & (size < float("inf"))
    length_of = tl.sqrt(size)
    ph = (r * tl.where(active, 1.0 / length_of, 0.0)[:, None]).to(OPERAND)
    tl.store(ph_at, ph)
    c = size * 0.0
    if INTERCEPT:
        kbar = state_rows(mean, i, T, D, DP)
        c = tl.sum(ph.to(tl.float32) * kbar, 1)
    steps = tl.zeros([M], tl.int32)

    source, key_row = start_of(keys, key_head, length, DP, DESCRIPTOR)
    if HAS_BIAS:
        bias += head_of(pair, H, BIAS_HEADS).to(tl.int64) * length
    if HAS_DECAY:
        at = head_of(pair, H, DECAY_HEADS).to(tl.int64) * length
        high += at
        low += at
        first += at
    row_high, row_low, row_first = row_decay(high, low, first, i, T, S, HAS_DECAY, CAUSAL)
    start, seen_whole, cut, stop = key_range(
        tile * M, tl.minimum(tile * M + M, T), first, T, S, left, right,
        N, CAUSAL, HAS_LEFT, HAS_RIGHT, HAS_DECAY,
    )
    count = 0
    going = tl.max(active.to(tl.int32), 0)
    while (going > 0) & (count < limit):
        tl.debug_barrier()  # what one thread wrote another reads
        both = tl.load(both_at)
        sums = tl.zeros([M, DP], tl.float32)
        for part in tl.static_range(3):  # cut by the left edge, seen whole, cut by the right
            low_end, high_end = part_of(part, start, seen_whole, cut, stop, HAS_LEFT, HAS_DECAY)
            for j0 in tl.range(low_end, high_end, N):
                sums = _step(
                    j0, both, c, factor, base, sums, source, key_row, bias, high, low,
                    i, row_high, row_low, row_first, T, S, left, right, M, N, DP, OPERAND,
                    DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, part != 1, PRECISION,
                )
        d = tl.load(ph_at).to(tl.float32)
        y = sums * inverse[:, None] + shift[:, None] * d
        r = state_rows(r_io, i, T, D, DP)
        curvature = tl.sum(d * y, 1)
        # Rows that are done have d = 0 and y = 0. One whose y is no number spoils itself only.
        active = active & (curvature > 0) & (curvature < float("inf"))
        a = tl.where(active, tl.sum(r * d, 1) / curvature, 0.0)
        r -= a[:, None] * y
        put_rows(r_io, i, T, r, D, DP)
        smallest = tl.where(active, tl.minimum(smallest, a / length_of), smallest)
        steps += active.to(tl.int32)
        size = tl.where(active, tl.sum(r * r, 1), size)
        active = active & (size > limit_of) & (size < float("inf"))
        x = state_rows(x_io, i, T, D, DP)
        put_rows(x_io, i, T, x + a[:, None] * d, D, DP)
        going = tl.max(active.to(tl.int32), 0)
        if going > 0:
            turn = tl.where(active, tl.sum(r * y, 1) / curvature, 0.0)
            # r is now orthogonal to d, whose norm is 1 but for rounding: no sum for that of p.
            length_of = tl.where(active, tl.sqrt(size + turn * turn), length_of)
            scaling = tl.where(active, 1.0 / length_of, 0.0)
            ph = ((r - turn[:, None] * d) * scaling[:, None]).to(OPERAND)
            tl.store(ph_at, ph)
            if INTERCEPT:
                kbar = state_rows(mean, i, T, D, DP)
                c = tl.sum(ph.to(tl.float32) * kbar, 1)
        count += 1

    tl.debug_barrier()
    r = state_rows(r_io, i, T, D, DP)
    x = state_rows(x_io, i, T, D, DP)
    # A step that was taken is at most 1 / lambda; a wild one (rounding) is not taken again.
    free = tl.where((smallest > 0) & (smallest * shift <= 1.0), smallest, 0.0)
    x += free[:, None] * r
    nothing = whole <= 0
    left_over = tl.where(nothing, 0.0, tl.sqrt(size / tl.where(nothing, 1.0, whole)))
    # After D steps, enough in exact arithmetic, worse than x = 0; or no numbers any more.
    lost = ((steps >= D) & (size > whole)) | (tl.sum(x * 0.0, 1) != 0.0)
    lost = lost | ~(left_over < float("inf"))
    x = tl.where(lost[:, None], 0.0, x)
    left_over = tl.where(lost, 1.0, left_over)
    bad = lost | (left_over > tol * 1.00001)
    if not STARTED:
        noise = EPSILON * tl.sqrt(tl.sum(x * x, 1)) * (norms + tl.sqrt(whole))
        bad = bad | ~(noise < NOISE)
        x = x * (1.0 / sigma_k)
    bad = bad & (tol > 0)  # with 0 nothing is asked for
    if HALF:
        bad = bad | beyond(overflow + key_head, i, T, S, right, HAS_RIGHT)
    put_rows(x_io, i, T, x, D, DP)
    tl.store(iterations + rows + i, steps, mask=live)
    tl.store(residual + rows + i, left_over, mask=live)
    tl.store(failed + rows + i, (bad & some).to(tl.int8), mask=live)
