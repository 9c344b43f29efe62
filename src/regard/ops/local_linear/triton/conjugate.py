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


@triton.jit
def kept_rows(x, i, T, D: tl.constexpr, DP: tl.constexpr):
    """Rows i of a contiguous x [T, D]; beyond T the last, of which nothing is kept."""
    channels = tl.arange(0, DP)
    places = (tl.minimum(i, T - 1) * D)[:, None] + channels[None, :]
    if D == DP:
        found = tl.load(x + places)
    else:
        found = tl.load(x + places, mask=(channels < D)[None, :], other=0.0)
    return found


@triton.jit
def keep_rows(target, i, T, values, D: tl.constexpr, DP: tl.constexpr):
    """Writes [M, DP] to rows i of a contiguous [T, D]."""
    channels = tl.arange(0, DP)
    there = (i < T)[:, None]
    if D != DP:
        there = there & (channels < D)[None, :]
    tl.store(target + ((i * D)[:, None] + channels[None, :]), values, mask=there)


@triton.jit
def _terms(
    i, T, total_in, lse_in, ridge, ridge_t, sigma_k, ABSOLUTE: tl.constexpr, HALF: tl.constexpr
):
    """Of rows i: whether there is a key, what sums are multiplied with, and lambda."""
    live = i < T
    total = tl.load(total_in + i, mask=live, other=0.0)
    some = total > 0
    inverse = tl.where(some, (0.015625 if HALF else 1.0) / total, 0.0)
    shift = tl.load(ridge + i.to(tl.int64) * ridge_t, mask=live, other=1.0)
    if ABSOLUTE:
        lse = tl.load(lse_in + i, mask=live, other=0.0)
        shift = shift * tl.exp(-tl.where(some, lse, 0.0))
    return some, inverse, shift / (sigma_k * sigma_k)


@triton.jit
def _begin(
    i, ph_at, q, qt, centre, mean, goal, x_io, r_io, iterations, residual, T,
    total_in, lse_in, ridge, ridge_t, sigma_k, tol,
    D: tl.constexpr, DP: tl.constexpr, STARTED: tl.constexpr, FROM_QUERY: tl.constexpr,
    ABSOLUTE: tl.constexpr, INTERCEPT: tl.constexpr, HALF: tl.constexpr, OPERAND: tl.constexpr,
):
    """The first direction of rows i, which is the residual, and what is known of them then."""
    live = i < T
    some, inverse, shift = _terms(i, T, total_in, lse_in, ridge, ridge_t, sigma_k, ABSOLUTE, HALF)
    smallest = inverse * 0.0 + float("inf")
    if STARTED:
        r = state_rows(r_io, i, T, D, DP)
        size = tl.sum(r * r, 1)
        whole = tl.load(goal + i, mask=live, other=0.0)
        whole = whole * whole
        norms = size * 0.0
    else:
        channels = tl.arange(0, DP)
        middle = tl.load(centre + channels)[None, :]
        raw = raw_rows(q, i, qt, T, D, DP)
        r = -(raw - middle) * (1.0 / sigma_k)
        r = tl.where(channels[None, :] < D, r, 0.0)
        norms = inverse * 0.0
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
    limit_of = tl.where(active, limit_of, float("inf"))  # of a row that is done
    length_of = tl.sqrt(size)
    ph = (r * tl.where(active, 1.0 / length_of, 0.0)[:, None]).to(OPERAND)
    tl.store(ph_at, ph)
    if INTERCEPT:
        kbar = state_rows(mean, i, T, D, DP)
        tl.store(residual + i, tl.sum(ph.to(tl.float32) * kbar, 1), mask=live)
    tl.store(iterations + i, active.to(tl.int32) * 0, mask=live)
    return smallest, length_of, limit_of, size, whole, norms, tl.max(active.to(tl.int32), 0)


@triton.jit
def _turn(
    rest, i, count, smallest, length_of, limit_of, ph_at, mean, x_io, r_io, iterations,
    residual, T, total_in, lse_in, ridge, ridge_t, sigma_k,
    D: tl.constexpr, DP: tl.constexpr, ABSOLUTE: tl.constexpr, INTERCEPT: tl.constexpr,
    HALF: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr,
):
    """The step of rows i, and their next direction; r_io holds the sums, `rest` what it held."""
    _, inverse, shift = _terms(i, T, total_in, lse_in, ridge, ridge_t, sigma_k, ABSOLUTE, HALF)
    d = tl.load(ph_at).to(tl.float32)
    y = kept_rows(r_io, i, T, D, DP) * inverse[:, None] + shift[:, None] * d
    curvature = tl.sum(d * y, 1)
    # Rows that are done have d = 0 and y = 0. One whose y is no number spoils itself only.
    active = limit_of < float("inf")
    usual = active & (curvature > 0) & (curvature < float("inf"))
    a = tl.where(usual, tl.sum(rest * d, 1) / curvature, 0.0)
    rest -= a[:, None] * y
    smallest = tl.where(usual, tl.minimum(smallest, a / length_of), smallest)
    tl.store(iterations + i, count + usual.to(tl.int32), mask=(i < T) & active)
    size = tl.sum(rest * rest, 1)
    turn = tl.sum(rest * y, 1) / curvature
    keep_rows(r_io, i, T, rest, D, DP)
    active = usual & (size > limit_of) & (size < float("inf"))
    limit_of = tl.where(active, limit_of, float("inf"))
    keep_rows(x_io, i, T, kept_rows(x_io, i, T, D, DP) + a[:, None] * d, D, DP)
    going = tl.max(active.to(tl.int32), 0)
    go_on = going
    if SPLIT:  # the other half may, and must find directions of 0 here
        go_on = 1
    if go_on > 0:
        turn = tl.where(active, turn, 0.0)
        # r is now orthogonal to d, whose norm is 1 but for rounding: no sum for that of p.
        length_of = tl.where(active, tl.sqrt(size + turn * turn), 1.0)
        scaling = tl.where(active, 1.0 / length_of, 0.0)
        next_d = ((rest - turn[:, None] * d) * scaling[:, None]).to(OPERAND)
        tl.store(ph_at, next_d)
        if INTERCEPT:
            kbar = kept_rows(mean, i, T, D, DP)
            tl.store(residual + i, tl.sum(next_d.to(tl.float32) * kbar, 1), mask=i < T)
    return smallest, length_of, limit_of, size, going


@triton.jit
def _end(
    i, smallest, size, whole, norms, x_io, r_io, iterations, residual, failed, overflow,
    T, S, right, total_in, lse_in, ridge, ridge_t, sigma_k, tol,
    D: tl.constexpr, DP: tl.constexpr, STARTED: tl.constexpr, ABSOLUTE: tl.constexpr,
    HALF: tl.constexpr, HAS_RIGHT: tl.constexpr,
):
    """The last, free step of rows i, and what is to tell of them."""
    live = i < T
    some, _, shift = _terms(i, T, total_in, lse_in, ridge, ridge_t, sigma_k, ABSOLUTE, HALF)
    r = state_rows(r_io, i, T, D, DP)
    x = state_rows(x_io, i, T, D, DP)
    # A step that was taken is at most 1 / lambda; a wild one (rounding) is not taken again.
    free = tl.where((smallest > 0) & (smallest * shift <= 1.0), smallest, 0.0)
    x += free[:, None] * r
    nothing = whole <= 0
    left_over = tl.where(nothing, 0.0, tl.sqrt(size / tl.where(nothing, 1.0, whole)))
    # After D steps, enough in exact arithmetic, worse than x = 0; or no numbers any more.
    steps = tl.load(iterations + i, mask=live, other=0)
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
        bad = bad | beyond(overflow, i, T, S, right, HAS_RIGHT)
    put_rows(x_io, i, T, x, D, DP)
    tl.store(residual + i, left_over, mask=live)
    tl.store(failed + i, (bad & some).to(tl.int8), mask=live)


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
    # Rows of few keys have little to do in a step but take many: they must not come last.
    rank = tiles - 1 - tile
    few = tiles // 8
    half = tiles // 2
    tile = tl.where(rank < half, tile, tl.where(rank < half + few, rank - half, tile + few))
    b = pair // H
    h = pair % H
    key_head = b * HK + h // (H // HK)
    rows = pair.to(tl.int64) * T
    i = tile * M + tl.arange(0, M)
    live = i < T
    # 128 channels of all rows are too many for the registers of a step: rows come by halves.
    PART: tl.constexpr = M // 2 if DP >= 128 else M
    upper = tile * M + tl.arange(0, PART)
    lower = upper + PART
    x_io += rows * D
    r_io += rows * D
    mean += rows * D
    q += b.to(tl.int64) * qb + h.to(tl.int64) * qh
    centre += key_head * DP
    overflow += key_head
    top_in += rows
    total_in += rows
    lse_in += rows
    ridge += b * ridge_b + h * ridge_h
    iterations += rows
    residual += rows
    failed += rows
    if STARTED:
        goal += rows
    # Queries and directions of a tile lie together, as one operand of a product.
    together_at = (pair.to(tl.int64) * tiles + tile) * (2 * M * DP)
    both_at = both_io + together_at + (tl.arange(0, 2 * M) * DP)[:, None]
    both_at += tl.arange(0, DP)[None, :]
    square = (tl.arange(0, M) * DP)[:, None] + tl.arange(0, DP)[None, :]
    part_square = (tl.arange(0, PART) * DP)[:, None] + tl.arange(0, DP)[None, :]
    upper_at = both_io + together_at + M * DP + part_square
    lower_at = upper_at + PART * DP
    queries, guard = operand_rows(raw_rows(q, i, qt, T, D, DP), HALF, OPERAND)
    sigma_k = tl.load(sigma + key_head * 2)
    tl.store(both_io + together_at + square, queries)
    factor = guard * (tl.load(scale + b * scale_b + h * scale_h) * LOG2E * sigma_k)
    top = tl.load(top_in + i, mask=live, other=float("-inf"))
    base = tl.where(top == float("-inf"), 0.0, top) - LIFT
    smallest_u, length_u, limit_u, size_u, whole_u, norms_u, going_u = _begin(
        upper, upper_at, q, qt, centre, mean, goal, x_io, r_io, iterations, residual, T,
        total_in, lse_in, ridge, ridge_t, sigma_k, tol,
        D, DP, STARTED, FROM_QUERY, ABSOLUTE, INTERCEPT, HALF, OPERAND,
    )
    going = going_u
    if PART < M:
        smallest_l, length_l, limit_l, size_l, whole_l, norms_l, going_l = _begin(
            lower, lower_at, q, qt, centre, mean, goal, x_io, r_io, iterations, residual, T,
            total_in, lse_in, ridge, ridge_t, sigma_k, tol,
            D, DP, STARTED, FROM_QUERY, ABSOLUTE, INTERCEPT, HALF, OPERAND,
        )
        going = tl.maximum(going_u, going_l)

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
    while (going > 0) & (count < limit):
        # 0, unknown to the compiler: it would keep all addresses in registers over the products.
        zero = going >> 31
        now = i + zero
        tl.debug_barrier()  # what one thread wrote another reads
        both = tl.load(both_at + zero * DP)
        # c comes through memory too, as whatever is computed from it would in its distribution.
        c = tl.zeros([M], tl.float32)
        if INTERCEPT:
            c = tl.load(residual + now, mask=live, other=0.0)
        sums = tl.zeros([M, DP], tl.float32)
        for part in tl.static_range(3):  # cut by the left edge, seen whole, cut by the right
            low_end, high_end = part_of(part, start, seen_whole, cut, stop, HAS_LEFT, HAS_DECAY)
            for j0 in tl.range(low_end, high_end, N):
                sums = _step(
                    j0, both, c, factor, base, sums, source, key_row, bias, high, low,
                    i, row_high, row_low, row_first, T, S, left, right, M, N, DP, OPERAND,
                    DESCRIPTOR, HAS_LEFT, HAS_RIGHT, HAS_BIAS, HAS_DECAY, part != 1, PRECISION,
                )
        # The rest is done in another distribution over the threads than the products: the sums go
        # there once, through the memory of r, where every step would go by itself.
        rest_u = kept_rows(r_io, upper + zero, T, D, DP)
        if PART < M:
            rest_l = kept_rows(r_io, lower + zero, T, D, DP)
        tl.debug_barrier()
        keep_rows(r_io, now, T, sums, D, DP)
        tl.debug_barrier()
        smallest_u, length_u, limit_u, size_u, going_u = _turn(
            rest_u, upper + zero, count, smallest_u, length_u, limit_u, upper_at + zero * DP, mean,
            x_io, r_io, iterations, residual, T, total_in, lse_in, ridge, ridge_t, sigma_k,
            D, DP, ABSOLUTE, INTERCEPT, HALF, OPERAND, PART < M,
        )
        going = going_u
        if PART < M:
            smallest_l, length_l, limit_l, size_l, going_l = _turn(
                rest_l, lower + zero, count, smallest_l, length_l, limit_l, lower_at + zero * DP,
                mean, x_io, r_io, iterations, residual, T, total_in, lse_in, ridge, ridge_t,
                sigma_k, D, DP, ABSOLUTE, INTERCEPT, HALF, OPERAND, True,
            )
            going = tl.maximum(going_u, going_l)
        count += 1

    tl.debug_barrier()
    _end(
        upper, smallest_u, size_u, whole_u, norms_u, x_io, r_io, iterations, residual, failed,
        overflow, T, S, right, total_in, lse_in, ridge, ridge_t, sigma_k, tol,
        D, DP, STARTED, ABSOLUTE, HALF, HAS_RIGHT,
    )
    if PART < M:
        _end(
            lower, smallest_l, size_l, whole_l, norms_l, x_io, r_io, iterations, residual, failed,
            overflow, T, S, right, total_in, lse_in, ridge, ridge_t, sigma_k, tol,
            D, DP, STARTED, ABSOLUTE, HALF, HAS_RIGHT,
        )
