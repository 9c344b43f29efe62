"""The backward along the keys, from the end: dk, dv and the decays; see `backward`."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton.backward import of_rows
from regard.ops.linear.triton.forward import put_state, put_state_row, state_row, state_tile
from regard.ops.linear.triton.maps import chain, features
from regard.ops.linear.triton.walk import (
    FORGETS,
    inside,
    numbers,
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
def keys_kernel(
    q, k, v, decay, mask, ends, end_totals, grad, shares, losses, grad_k, grad_v,
    grad_decay, crossing_in, states_in, totals_in, grad_start, grad_start_total,
    scale,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, db, dh, dt, mb, mt,
    T, S, segments, chunks,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, C: tl.constexpr, MAP_Q: tl.constexpr, MAP_K: tl.constexpr,
    TWO: tl.constexpr, FLOORED_Q: tl.constexpr, FLOORED_K: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, HAS_END: tl.constexpr,
    NORMALISED: tl.constexpr, SCALED: tl.constexpr, OF_DECAY: tl.constexpr, OF_START: tl.constexpr,
    OPERAND: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and the gradient of the decay of a segment of keys; segment 0: of the first state.

    ends [B HK, segments, F, E]: the gradient of the state after a segment, the last first.
    """
    F: tl.constexpr = D * (2 if TWO else 1)
    GROUP: tl.constexpr = H // HK
    segment = tl.program_id(0) % segments
    pair = tl.program_id(0) // segments
    batch = (pair // HK).to(tl.int64)
    key_head = pair % HK
    head = key_head * GROUP
    q += batch * qb + head * qh
    k += batch * kb + key_head * kh
    v += batch * vb + key_head * vh
    grad += batch * gb + head * gh
    if HAS_DECAY:
        decay += batch * db + key_head * dh
    if HAS_MASK:
        mask += batch * mb
    if NORMALISED:
        shares += (batch * H + head) * T
        losses += (batch * H + head) * T
    grad_k += pair.to(tl.int64) * S * D
    grad_v += pair.to(tl.int64) * S * E
    length = tl.maximum(T, S)
    if OF_DECAY:
        crossing_in += (batch * H + head) * length
        first_chunk = pair.to(tl.int64) * ((length + C - 1) // C)
        states_in += first_chunk * (F * E)
        grad_decay += pair.to(tl.int64) * S
        if NORMALISED:
            totals_in += first_chunk * F
    state = tl.zeros([DP, EP], tl.float32)
    state_b = state
    total = tl.zeros([DP], tl.float32)
    total_b = total
    if HAS_END:
        place = pair.to(tl.int64) * segments + segments - 1 - segment
        ends += place * (F * E)
        state = state_tile(ends, D, DP, E, EP, 0, 0)
        if TWO:
            state_b = state_tile(ends, D, DP, E, EP, 0, 1)
        if NORMALISED:
            end_totals += place * F
            total = state_row(end_totals, D, DP, 0)
            if TWO:
                total_b = state_row(end_totals, D, DP, 1)
    first = segment * chunks * C
    count = (tl.minimum(first + chunks * C, length) - first + C - 1) // C
    i = tl.arange(0, C)
    for step in tl.range(0, count):
        at = first + (count - 1 - step) * C
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
        short = state.to(OPERAND)
        short_b = short
        if TWO:
            short_b = state_b.to(OPERAND)
        of_total = total
        of_total_b = total_b
        whole = tl.zeros([], tl.float32)
        if HAS_DECAY:
            since, chunk = steps(decay, at, length - S, real, dt, C, SUMS)
            kept = power(chunk)
            if OF_DECAY:
                chunk_at = tl.cast(at // C, tl.int64)
                before = state_tile(states_in + chunk_at * (F * E), D, DP, E, EP, 0, 0)
                whole = tl.sum(times(kept, before.to(tl.float32)) * state)
                if TWO:
                    before = state_tile(states_in + chunk_at * (F * E), D, DP, E, EP, 0, 1)
                    whole += tl.sum(times(kept, before.to(tl.float32)) * state_b)
                if NORMALISED:
                    row = state_row(totals_in + chunk_at * F, D, DP, 0)
                    whole += tl.sum(times(kept, row) * total)
                    if TWO:
                        row = state_row(totals_in + chunk_at * F, D, DP, 1)
                        whole += tl.sum(times(kept, row) * total_b)
            state = times(kept, state)
            total = times(kept, total)
            if TWO:
                state_b = times(kept, state_b)
                total_b = times(kept, total_b)
        # One after the other, dv and dk: together they would need more registers than there are.
        dv = tl.zeros([C, EP], tl.float32)
        for member in tl.range(0, GROUP):
            x = tile(q + member * qh, at, length - T, T, qt, C, D, DP, 0)
            q1 = x
            q2 = x
            if MAP_Q != 0 or FLOORED_Q:
                q1, q2 = features(x.to(tl.float32), i >= 0, MAP_Q, TWO, FLOORED_Q, D, DP)
            q1 = q1.to(OPERAND)
            q2 = q2.to(OPERAND)
            grad_n, grad_b = of_rows(
                grad + member * gh, shares + member * T, losses + member * T, scale,
                at, length - T, T, gt, C, E, EP, 0, NORMALISED, SCALED,
            )  # fmt: skip
            n = grad_n.to(OPERAND)
            if NORMALISED:
                share = grad_b[:, None]
                if HAS_DECAY:
                    share = power(since)[:, None] * share
                total += tl.sum(q1.to(tl.float32) * share, 0)
                if TWO:
                    total_b += tl.sum(q2.to(tl.float32) * share, 0)
            scores = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
            if TWO:
                scores = tl.dot(k2, tl.trans(q2), scores, input_precision=PRECISION)
            if HAS_DECAY:
                scores = times(inside(at, since, C, SUMS, False), scores)
                entering = power(since)[:, None]
                q1 = (entering * q1.to(tl.float32)).to(OPERAND)
                if TWO:
                    q2 = (entering * q2.to(tl.float32)).to(OPERAND)
            else:
                scores = tl.where(seen_in(at, C, False), scores, 0.0)
            dv = tl.dot(scores.to(OPERAND), n, dv, input_precision=PRECISION)
            state = tl.dot(tl.trans(q1), n, state, input_precision=PRECISION)
            if TWO:
                state_b = tl.dot(tl.trans(q2), n, state_b, input_precision=PRECISION)
        through = tl.dot(k1, short, input_precision=PRECISION)  # what later chunks have of them
        if TWO:
            through = tl.dot(k2, short_b, through, input_precision=PRECISION)
        leaves = tl.zeros([C], tl.float32)
        lasting = tl.zeros([C], tl.float32) + 1.0
        later = values
        if HAS_DECAY:
            lasting = power(chunk - since)
            through = times(lasting[:, None], through)
            if OF_DECAY:
                leaves = tl.sum(values.to(tl.float32) * through, 1)
            later = (lasting[:, None] * values.to(tl.float32)).to(OPERAND)
        dv += through
        if HAS_MASK:
            dv = tl.where(real[:, None], dv, 0.0)
        put(grad_v, at, length - S, S, dv, C, E, EP, 0)

        enters = tl.zeros([C], tl.float32)
        d1 = tl.dot(later, tl.trans(short), input_precision=PRECISION)
        d2 = d1
        if TWO:
            d2 = tl.dot(later, tl.trans(short_b), input_precision=PRECISION)
        if NORMALISED:
            d1 += lasting[:, None] * of_total[None, :]
            if TWO:
                d2 += lasting[:, None] * of_total_b[None, :]
            if OF_DECAY:
                of_sums = tl.sum(k1.to(tl.float32) * of_total[None, :], 1)
                if TWO:
                    of_sums += tl.sum(k2.to(tl.float32) * of_total_b[None, :], 1)
                leaves += lasting * of_sums
        for member in tl.range(0, GROUP):
            grad_n, grad_b = of_rows(
                grad + member * gh, shares + member * T, losses + member * T, scale,
                at, length - T, T, gt, C, E, EP, 0, NORMALISED, SCALED,
            )  # fmt: skip
            products = tl.dot(values, tl.trans(grad_n.to(OPERAND)), input_precision=PRECISION)
            if NORMALISED:
                products += grad_b[None, :]
            if HAS_DECAY:
                products = times(inside(at, since, C, SUMS, False), products)
            else:
                products = tl.where(seen_in(at, C, False), products, 0.0)
            products = products.to(OPERAND)
            x = tile(q + member * qh, at, length - T, T, qt, C, D, DP, 0)
            q1 = x
            q2 = x
            if MAP_Q != 0 or FLOORED_Q:
                q1, q2 = features(x.to(tl.float32), i >= 0, MAP_Q, TWO, FLOORED_Q, D, DP)
            d1 = tl.dot(products, q1.to(OPERAND), d1, input_precision=PRECISION)
            if TWO:
                d2 = tl.dot(products, q2.to(OPERAND), d2, input_precision=PRECISION)
            if OF_DECAY:
                enters += numbers(crossing_in + member * length, at, 0, length, 1, C)
        if OF_DECAY:
            crossing = whole + tl.cumsum(enters, 0, reverse=True)
            # Of earlier keys only: a sum less its last term would leave that one's rounding.
            crossing += tl.sum(tl.where(i[:, None] < i[None, :], leaves[:, None], 0.0), 0)
            step_of = numbers(decay, at, length - S, S, dt, C)
            crossing = tl.where(real & (step_of >= FORGETS), crossing, 0.0)
            put_numbers(grad_decay, at, length - S, S, crossing, C)
        if MAP_K != 0 or FLOORED_K:
            d1 = chain(y.to(tl.float32), d1, d2, MAP_K, TWO, FLOORED_K, D, DP)
        if HAS_MASK:
            d1 = tl.where(real[:, None], d1, 0.0)
        put(grad_k, at, length - S, S, d1, C, D, DP, 0)
    if OF_START and segment == 0:
        grad_start += pair.to(tl.int64) * (F * E)
        put_state(grad_start, state, D, DP, E, EP, 0, 0)
        if TWO:
            put_state(grad_start, state_b, D, DP, E, EP, 0, 1)
        if NORMALISED:
            grad_start_total += pair.to(tl.int64) * F
            put_state_row(grad_start_total, total, D, DP, 0)
            if TWO:
                put_state_row(grad_start_total, total_b, D, DP, 1)
