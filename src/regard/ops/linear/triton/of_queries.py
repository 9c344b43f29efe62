"""The backward along the queries: dq, from the states before each chunk; see `backward`."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton.backward import of_rows
from regard.ops.linear.triton.forward import put_state, put_state_row, state_row, state_tile
from regard.ops.linear.triton.maps import chain, features
from regard.ops.linear.triton.walk import (
    inside,
    power,
    put,
    put_numbers,
    real_keys,
    seen_in,
    steps,
    tile,
    times,
)


@triton.jit(do_not_specialize=["T", "S", "segments", "chunks"])
def queries_kernel(
    q, k, v, decay, mask, starts, start_totals, grad, shares, losses, grad_q,
    crossing_out, states_out, totals_out, scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, db, dh, dt, mb, mt,
    T, S, segments, chunks,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, C: tl.constexpr, MAP_Q: tl.constexpr, MAP_K: tl.constexpr,
    TWO: tl.constexpr, FLOORED_Q: tl.constexpr, FLOORED_K: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, HAS_START: tl.constexpr,
    NORMALISED: tl.constexpr, SCALED: tl.constexpr, OF_DECAY: tl.constexpr,
    OPERAND: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a segment of queries, and for the gradient of the decay what `keys_kernel` needs.

    crossing_out [B H, length]: q_t . (w_t (S n_t + b_t z)), and of the pairs in the chunk those
    with this query less those with this key; states_out [B HK, all chunks, F, E]
    and totals_out: the state before each chunk.
    """
    F: tl.constexpr = D * (2 if TWO else 1)
    segment = tl.program_id(0) % segments
    pair = tl.program_id(0) // segments
    batch = (pair // H).to(tl.int64)
    head = pair % H
    key_head = head // (H // HK)
    key_pair = batch * HK + key_head
    q += batch * qb + head * qh
    k += batch * kb + key_head * kh
    v += batch * vb + key_head * vh
    grad += batch * gb + head * gh
    if HAS_DECAY:
        decay += batch * db + key_head * dh
    if HAS_MASK:
        mask += batch * mb
    rows = pair.to(tl.int64) * T
    if NORMALISED:
        shares += rows
        losses += rows
    grad_q += rows * D
    length = tl.maximum(T, S)
    if OF_DECAY:
        crossing_out += pair.to(tl.int64) * length
        first_chunk = key_pair * ((length + C - 1) // C)
        states_out += first_chunk * (F * E)
        if NORMALISED:
            totals_out += first_chunk * F
    leads = head % (H // HK) == 0
    state = tl.zeros([DP, EP], tl.float32)
    state_b = state
    total = tl.zeros([DP], tl.float32)
    total_b = total
    if HAS_START:
        place = key_pair * segments + segment
        starts += place * (F * E)
        state = state_tile(starts, D, DP, E, EP, 0, 0).to(tl.float32)
        if TWO:
            state_b = state_tile(starts, D, DP, E, EP, 0, 1).to(tl.float32)
        if NORMALISED:
            start_totals += place * F
            total = state_row(start_totals, D, DP, 0)
            if TWO:
                total_b = state_row(start_totals, D, DP, 1)
    first = segment * chunks * C
    for at in tl.range(first, tl.minimum(first + chunks * C, length), C):
        y = tile(k, at, length - S, S, kt, C, D, DP, 0)
        values = tile(v, at, length - S, S, vt, C, E, EP, 0)
        real = real_keys(at, length - S, S, mask, mt, C, HAS_MASK)
        k1 = y
        k2 = y
        if MAP_K != 0 or FLOORED_K:
            k1, k2 = features(y.to(tl.float32), real, MAP_K, TWO, FLOORED_K, D, DP)
        if HAS_MASK:
            k1 = tl.where(real[:, None], k1, 0.0)
            values = tl.where(real[:, None], values, 0.0)
        k1 = k1.to(OPERAND)
        k2 = k2.to(OPERAND)
        values = values.to(OPERAND)
        if HAS_DECAY:
            since, chunk = steps(decay, at, length - S, real, dt, C, SUMS)
            kept = power(chunk)
        of_total = total
        of_total_b = total_b
        if NORMALISED:
            if HAS_DECAY:
                leaving = power(chunk - since)[:, None]
                total = times(kept, total)
                total += tl.sum((leaving * k1.to(tl.float32)).to(OPERAND).to(tl.float32), 0)
                if TWO:
                    total_b = times(kept, total_b)
                    total_b += tl.sum((leaving * k2.to(tl.float32)).to(OPERAND).to(tl.float32), 0)
            else:
                total += tl.sum(k1.to(tl.float32), 0)
                if TWO:
                    total_b += tl.sum(k2.to(tl.float32), 0)
        grad_n, grad_b = of_rows(
            grad, shares, losses, scale, at, length - T, T, gt, C, E, EP, 0, NORMALISED, SCALED
        )
        x = tile(q, at, length - T, T, qt, C, D, DP, 0)
        q1 = x
        q2 = x
        if OF_DECAY and (MAP_Q != 0 or FLOORED_Q):
            ones = tl.arange(0, C) >= 0
            q1, q2 = features(x.to(tl.float32), ones, MAP_Q, TWO, FLOORED_Q, D, DP)
        q1 = q1.to(OPERAND)
        q2 = q2.to(OPERAND)
        n = grad_n.to(OPERAND)
        products = tl.dot(n, tl.trans(values), input_precision=PRECISION)
        if NORMALISED:
            products += grad_b[:, None]
        crossing = tl.zeros([C], tl.float32)
        if HAS_DECAY:
            products = times(inside(at, since, C, SUMS, True), products)
            if OF_DECAY:
                spots = at + tl.arange(0, C)
                scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                if TWO:
                    scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
                earlier = spots[:, None] > spots[None, :]
                pairs = tl.where(earlier, times(products, scores), 0.0)
                crossing = tl.sum(pairs, 1)
                crossing -= tl.sum(pairs, 0)
        else:
            products = tl.where(seen_in(at, C, True), products, 0.0)
        products = products.to(OPERAND)
        short = state.to(OPERAND)
        if OF_DECAY and leads:
            chunk_at = tl.cast(at // C, tl.int64)
            put_state(states_out + chunk_at * (F * E), short, D, DP, E, EP, 0, 0)
            if TWO:
                put_state(states_out + chunk_at * (F * E), state_b.to(OPERAND), D, DP, E, EP,
                          0, 1)  # fmt: skip
            if NORMALISED:
                put_state_row(totals_out + chunk_at * F, of_total, D, DP, 0)
                if TWO:
                    put_state_row(totals_out + chunk_at * F, of_total_b, D, DP, 1)
        d1 = tl.dot(n, tl.trans(short), input_precision=PRECISION)
        d2 = d1
        if TWO:
            d2 = tl.dot(n, tl.trans(state_b.to(OPERAND)), input_precision=PRECISION)
        if NORMALISED:
            d1 += grad_b[:, None] * of_total[None, :]
            if TWO:
                d2 += grad_b[:, None] * of_total_b[None, :]
        # A row that no loss looks at has no gradient, even where the state has overflowed.
        heard = (tl.max(tl.abs(n.to(tl.float32)), 1) != 0) | (grad_b != 0)
        d1 = tl.where(heard[:, None], d1, 0.0)
        if TWO:
            d2 = tl.where(heard[:, None], d2, 0.0)
        if HAS_DECAY:
            entering = power(since)[:, None]
            d1 = times(entering, d1)
            if TWO:
                d2 = times(entering, d2)
        if OF_DECAY:
            crossing += tl.sum(q1.to(tl.float32) * d1, 1)
            if TWO:
                crossing += tl.sum(q2.to(tl.float32) * d2, 1)
            put_numbers(crossing_out, at, 0, length, crossing, C)
        d1 = tl.dot(products, k1, d1, input_precision=PRECISION)
        if TWO:
            d2 = tl.dot(products, k2, d2, input_precision=PRECISION)
        dx = chain(x.to(tl.float32), d1, d2, MAP_Q, TWO, FLOORED_Q, D, DP)
        put(grad_q, at, length - T, T, dx, C, D, DP, 0)
        if HAS_DECAY:
            later = power(chunk - since)[:, None]
            k1 = (later * k1.to(tl.float32)).to(OPERAND)
            state = times(kept, state)
            if TWO:
                k2 = (later * k2.to(tl.float32)).to(OPERAND)
                state_b = times(kept, state_b)
        state = tl.dot(tl.trans(k1), values, state, input_precision=PRECISION)
        if TWO:
            state_b = tl.dot(tl.trans(k2), values, state_b, input_precision=PRECISION)
