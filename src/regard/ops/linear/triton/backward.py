"""The backward: gradients of states segment by segment, then of queries and of keys.

With n_t = do_t / denominator, b_t = the gradient of the sum of weights, D the gradient of the
state after a chunk and P_tj = w_tj (q_t . k_j), G_tj = n_t . v_j + b_t:

    dq_t = sum_(j <= t) w_tj G_tj k_j + w_t (S n_t + b_t z)
    dk_j = sum_(t >= j) w_tj G_tj q_t + w_j (D v_j + dz),   dv_j = sum_t P_tj n_t + w_j D^T k_j
    D   <- w D + sum_t w_t q_t n_t^T,                       dz  <- w dz + sum_t w_t b_t q_t

The gradient of a step l of log_decay is the sum of P_tj G_tj over all j < l <= t. In a chunk
that is what comes from before it, and goes behind it, and of the pairs inside the sum of those
with t >= l less that of those with j >= l: no differences of sums longer than a chunk, in which
all digits could cancel. So it is right to the rounding of the largest pair of its chunk.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton.forward import (
    inverse,
    put_state,
    put_state_row,
)
from regard.ops.linear.triton.maps import features
from regard.ops.linear.triton.walk import (
    numbers,
    power,
    put_numbers,
    real_keys,
    steps,
    tile,
    times,
)


@triton.jit(do_not_specialize=["T", "tiles"])
def rows_kernel(
    grad, out, bottoms, shares, losses, minimum, epsilon,
    gb, gh, gt, T, tiles,
    H: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of every row: 1 / denominator, and the gradient of the sum of weights."""
    program = tl.program_id(0)
    pair = program // tiles
    at = (program % tiles) * C
    grad += (pair // H).to(tl.int64) * gb + (pair % H) * gh
    first = pair.to(tl.int64) * T
    g = tile(grad, at, 0, T, gt, C, E, EP, 0).to(tl.float32)
    o = tile(out + first * E, at, 0, T, E, C, E, EP, 0).to(tl.float32)
    bottom = numbers(bottoms + first, at, 0, T, 1, C)
    share = inverse(bottom, minimum, epsilon)
    # A row that no loss looks at has no gradient, even where it has overflowed.
    lost = -share * tl.sum(tl.where(g == 0, 0.0, g * o), 1)
    lost = tl.where(bottom + epsilon < minimum, 0.0, lost)
    put_numbers(shares + first, at, 0, T, share, C)
    put_numbers(losses + first, at, 0, T, lost, C)


@triton.jit
def of_rows(
    grad, shares, losses, scale, first, offset, T, stride,
    C: tl.constexpr, E: tl.constexpr, PANEL: tl.constexpr, column, NORMALISED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """n_t [C, PANEL] and b_t [C] of rows at positions [first, first + C)."""
    n = tile(grad, first, offset, T, stride, C, E, PANEL, column)
    b = tl.zeros([C], tl.float32)
    if NORMALISED:
        n = times(numbers(shares, first, offset, T, 1, C)[:, None], n.to(tl.float32))
        b = numbers(losses, first, offset, T, 1, C)
    elif SCALED:
        n = n.to(tl.float32) * scale
    return n, b


@triton.jit(do_not_specialize=["T", "S", "segments", "chunks", "skip"])
def cotangents_kernel(
    q, grad, shares, losses, decay, mask, sums, totals, weights, scale,
    qb, qh, qt, gb, gh, gt, db, dh, dt, mb, mt,
    T, S, segments, chunks, skip,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    PANEL: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr,
    FLOORED: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr,
    NORMALISED: tl.constexpr, SCALED: tl.constexpr, CAUSAL: tl.constexpr,
    OPERAND: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of a segment add to the gradient of the state before it.

    Segments skip .. skip + segments - 1 are walked; the last one goes to place 1 of
    sums [B HK, segments + 1, F, E], the first to the last: the order in which they are summed.
    """
    F: tl.constexpr = D * (2 if TWO else 1)
    PANELS: tl.constexpr = (E + PANEL - 1) // PANEL
    GROUP: tl.constexpr = H // HK
    program = tl.program_id(0)
    panel = program % PANELS
    segment = (program // PANELS) % segments
    pair = program // (PANELS * segments)
    batch = (pair // HK).to(tl.int64)
    key_head = pair % HK
    head = key_head * GROUP
    q += batch * qb + head * qh
    grad += batch * gb + head * gh
    rows = (batch * H + head) * T
    if NORMALISED:
        shares += rows
        losses += rows
    if HAS_DECAY:
        decay += batch * db + key_head * dh
    if HAS_MASK:
        mask += batch * mb
    column = panel * PANEL
    state = tl.zeros([DP, PANEL], tl.float32)
    state_b = state
    total = tl.zeros([DP], tl.float32)
    total_b = total
    whole = tl.zeros([], SUMS)
    length = T
    if CAUSAL:
        length = tl.maximum(T, S)
    first = (segment + skip) * chunks * C
    count = (tl.minimum(first + chunks * C, length) - first + C - 1) // C
    for n in tl.range(0, count * GROUP):
        member = n % GROUP
        at = first + (count - 1 - n // GROUP) * C
        x = tile(q + member * qh, at, length - T, T, qt, C, D, DP, 0)
        ones = tl.arange(0, C) >= 0
        grad_n, grad_b = of_rows(
            grad + member * gh, shares + member * T, losses + member * T, scale,
            at, length - T, T, gt, C, E, PANEL, column, NORMALISED, SCALED,
        )  # fmt: skip
        a, b = features(x.to(tl.float32), ones, MAP, TWO, FLOORED, D, DP)
        if HAS_DECAY:
            real = real_keys(at, length - S, S, mask, mt, C, HAS_MASK)
            since, chunk = steps(decay, at, length - S, real, dt, C, SUMS)
            entering = power(since)[:, None]
            a = entering * a
            b = entering * b
            once = member == 0  # in a chunk, whatever the size of the group
            kept = tl.where(once, power(chunk), 1.0)
            whole += tl.where(once, chunk, 0.0)
            state = times(kept, state)
            total = times(kept, total)
            if TWO:
                state_b = times(kept, state_b)
                total_b = times(kept, total_b)
        a = a.to(OPERAND)
        grad_n = grad_n.to(OPERAND)
        state = tl.dot(tl.trans(a), grad_n, state, input_precision=PRECISION)
        if NORMALISED:
            total += tl.sum(a.to(tl.float32) * grad_b[:, None], 0)
        if TWO:
            b = b.to(OPERAND)
            state_b = tl.dot(tl.trans(b), grad_n, state_b, input_precision=PRECISION)
            if NORMALISED:
                total_b += tl.sum(b.to(tl.float32) * grad_b[:, None], 0)
    last = segments - 1 - segment
    place = pair.to(tl.int64) * (segments + 1) + last + 1
    sums += place * (F * E)
    put_state(sums, state, D, DP, E, PANEL, column, 0)
    if TWO:
        put_state(sums, state_b, D, DP, E, PANEL, column, 1)
    if panel == 0:
        if NORMALISED:
            totals += place * F
            put_state_row(totals, total, D, DP, 0)
            if TWO:
                put_state_row(totals, total_b, D, DP, 1)
        if HAS_DECAY:
            tl.store(weights + pair * segments + last, power(whole))
