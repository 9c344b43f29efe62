"""The forward in three launches: what each segment adds, a scan over segments, and the outputs.

    S_n = w_n S_(n-1) + sum_j w_nj k_j v_j^T        z likewise, without v
    o_t = (w_t q_t S + sum_(j <= t) w_tj (q_t . k_j) v_j) / denominator

A call of one segment needs the last launch only. Products over features are sums over the two
blocks of `maps`; the second does not exist unless TWO. State matrices are [F, E] in float32,
cut into panels of PANEL columns, one per program.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton.maps import features
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


@triton.jit
def state_tile(state, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, PANEL: tl.constexpr,
               column, block):  # fmt: skip
    """A block of features [DP, PANEL] of a state [F, E], 0 outside."""
    rows, columns = tl.arange(0, DP), column + tl.arange(0, PANEL)
    inside = (rows < D)[:, None] & (columns < E)[None, :]
    places = (block * D + rows)[:, None] * E + columns[None, :]
    return tl.load(state + places, mask=inside, other=0.0)


@triton.jit
def put_state(state, values, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
              PANEL: tl.constexpr, column, block):  # fmt: skip
    """Writes what `state_tile` would read."""
    rows, columns = tl.arange(0, DP), column + tl.arange(0, PANEL)
    inside = (rows < D)[:, None] & (columns < E)[None, :]
    places = (block * D + rows)[:, None] * E + columns[None, :]
    tl.store(state + places, values, mask=inside)


@triton.jit
def state_row(z, D: tl.constexpr, DP: tl.constexpr, block):
    """A block of features [DP] of the state of the normaliser."""
    at = tl.arange(0, DP)
    return tl.load(z + block * D + at, mask=at < D, other=0.0)


@triton.jit
def put_state_row(z, values, D: tl.constexpr, DP: tl.constexpr, block):
    """Writes what `state_row` would read."""
    at = tl.arange(0, DP)
    tl.store(z + block * D + at, values, mask=at < D)


@triton.jit(do_not_specialize=["S", "offset", "segments", "chunks"])
def sums_kernel(
    k, v, decay, mask, sums, totals, weights,
    kb, kh, kt, vb, vh, vt, db, dh, dt, mb, mt,
    S, offset, segments, chunks,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, PANEL: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr, FLOORED: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment of keys adds to the state, at the end of the segment.

    sums [B HK, segments + 1, F, E], totals [.., F]: segment n goes to place n + 1; weights
    [B HK, segments]: what a segment multiplies the state before it by.
    """
    F: tl.constexpr = D * (2 if TWO else 1)
    PANELS: tl.constexpr = (E + PANEL - 1) // PANEL
    program = tl.program_id(0)
    panel = program % PANELS
    segment = (program // PANELS) % segments
    pair = program // (PANELS * segments)
    batch = (pair // HK).to(tl.int64)
    head = pair % HK
    k += batch * kb + head * kh
    v += batch * vb + head * vh
    if HAS_DECAY:
        decay += batch * db + head * dh
    if HAS_MASK:
        mask += batch * mb
    column = panel * PANEL
    state = tl.zeros([DP, PANEL], tl.float32)
    state_b = state
    total = tl.zeros([DP], tl.float32)
    total_b = total
    whole = tl.zeros([], SUMS)
    first = segment * chunks * C
    last = tl.minimum(first + chunks * C, S + offset)
    for at in tl.range(first, last, C):
        x = tile(k, at, offset, S, kt, C, D, DP, 0)
        values = tile(v, at, offset, S, vt, C, E, PANEL, column)
        real = real_keys(at, offset, S, mask, mt, C, HAS_MASK)
        a = x
        b = x
        if MAP != 0 or FLOORED or HAS_MASK or HAS_DECAY or NORMALISED:
            a, b = features(x.to(tl.float32), real, MAP, TWO, FLOORED, D, DP)
        if HAS_MASK:
            a = tl.where(real[:, None], a, 0.0)
            values = tl.where(real[:, None], values, 0.0)
        if HAS_DECAY:
            since, chunk = steps(decay, at, offset, real, dt, C, SUMS)
            leaving = power(chunk - since)[:, None]
            a = leaving * a
            b = leaving * b
            kept = power(chunk)
            state = times(kept, state)
            total = times(kept, total)
            if TWO:
                state_b = times(kept, state_b)
                total_b = times(kept, total_b)
            whole += chunk
        a = a.to(OPERAND)
        values = values.to(OPERAND)
        state = tl.dot(tl.trans(a), values, state, input_precision=PRECISION)
        if NORMALISED:
            total += tl.sum(a.to(tl.float32), 0)
        if TWO:
            b = b.to(OPERAND)
            state_b = tl.dot(tl.trans(b), values, state_b, input_precision=PRECISION)
            if NORMALISED:
                total_b += tl.sum(b.to(tl.float32), 0)
    place = pair.to(tl.int64) * (segments + 1) + segment + 1
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
            tl.store(weights + pair * segments + segment, power(whole))


@triton.jit
def _scanned(carry, x, weights, n, HAS_DECAY: tl.constexpr):
    if HAS_DECAY:
        carry = times(tl.load(weights + n), carry)
    return carry + x


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    sums, totals, weights, start, start_total, segments,
    SIZE: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_START: tl.constexpr, HAS_START_TOTAL: tl.constexpr,
):  # fmt: skip
    """In place: what segments 0 .. n add becomes the state before segment n, from `start` on.

    sums [pairs, segments + 1, SIZE], of which place n + 1 holds what segment n adds; totals
    likewise with TOTAL elements (0: there is none).
    """
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    PROGRAMS: tl.constexpr = BLOCKS + (TOTAL + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    pair = (program // PROGRAMS).to(tl.int64)
    part = program % PROGRAMS
    if HAS_DECAY:
        weights += pair * segments
    if part < BLOCKS:
        at = part * BLOCK + tl.arange(0, BLOCK)
        _scan(sums + pair * (segments + 1) * SIZE, weights, start + pair * SIZE, segments,
              at, SIZE, BLOCK, HAS_DECAY, HAS_START)  # fmt: skip
    else:
        at = (part - BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        _scan(totals + pair * (segments + 1) * TOTAL, weights, start_total + pair * TOTAL, segments,
              at, TOTAL, BLOCK, HAS_DECAY, HAS_START_TOTAL)  # fmt: skip


@triton.jit
def _scan(
    x, weights, start, segments, at,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    there = at < SIZE
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        carry = tl.load(start + at, mask=there, other=0.0)
    tl.store(x + at, carry, mask=there)
    x += at
    # Four loads at a time: a store would hold each of the next ones back.
    for n in tl.range(0, segments, 4):
        p = x + tl.cast(n + 1, tl.int64) * SIZE
        here = at * 0 + n
        second = there & (here + 1 < segments)
        third = there & (here + 2 < segments)
        fourth = there & (here + 3 < segments)
        x0 = tl.load(p, mask=there, other=0.0)
        x1 = tl.load(p + SIZE, mask=second, other=0.0)
        x2 = tl.load(p + 2 * SIZE, mask=third, other=0.0)
        x3 = tl.load(p + 3 * SIZE, mask=fourth, other=0.0)
        carry = _scanned(carry, x0, weights, n, HAS_DECAY)
        tl.store(p, carry, mask=there)
        carry = _scanned(carry, x1, weights, tl.minimum(n + 1, segments - 1), HAS_DECAY)
        tl.store(p + SIZE, carry, mask=second)
        carry = _scanned(carry, x2, weights, tl.minimum(n + 2, segments - 1), HAS_DECAY)
        tl.store(p + 2 * SIZE, carry, mask=third)
        carry = _scanned(carry, x3, weights, tl.minimum(n + 3, segments - 1), HAS_DECAY)
        tl.store(p + 3 * SIZE, carry, mask=fourth)


@triton.jit
def inverse(sums, minimum, epsilon):
    """1 / denominator of rows with these sums of weights; 0 where there is no weight."""
    bottom = tl.maximum(sums + epsilon, minimum)
    return tl.where(bottom == 0, 0.0, 1.0 / tl.where(bottom == 0, 1.0, bottom))


@triton.jit(do_not_specialize=["T", "S", "segments", "chunks"])
def outputs_kernel(
    q, k, v, decay, mask, starts, start_totals, out, bottoms, end, end_total,
    scale, minimum, epsilon,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, mb, mt,
    T, S, segments, chunks,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    PANEL: tl.constexpr, C: tl.constexpr, MAP_Q: tl.constexpr, MAP_K: tl.constexpr,
    TWO: tl.constexpr, FLOORED_Q: tl.constexpr, FLOORED_K: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, HAS_START: tl.constexpr,
    NORMALISED: tl.constexpr, WANTS_END: tl.constexpr,
    OPERAND: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a segment of queries; the last segment leaves the last state in `end`.

    bottoms [B H, T]: sums of weights as they are, for the backward.
    """
    F: tl.constexpr = D * (2 if TWO else 1)
    PANELS: tl.constexpr = (E + PANEL - 1) // PANEL
    program = tl.program_id(0)
    panel = program % PANELS
    segment = (program // PANELS) % segments
    pair = program // (PANELS * segments)
    batch = (pair // H).to(tl.int64)
    head = pair % H
    key_head = head // (H // HK)
    key_pair = batch * HK + key_head
    q += batch * qb + head * qh
    k += batch * kb + key_head * kh
    v += batch * vb + key_head * vh
    if HAS_DECAY:
        decay += batch * db + key_head * dh
    if HAS_MASK:
        mask += batch * mb
    out += pair.to(tl.int64) * T * E
    if NORMALISED:
        bottoms += pair.to(tl.int64) * T
    column = panel * PANEL
    state = tl.zeros([DP, PANEL], tl.float32)
    state_b = state
    total = tl.zeros([DP], tl.float32)
    total_b = total
    if HAS_START:
        place = key_pair * segments + segment
        starts += place * (F * E)
        state = state_tile(starts, D, DP, E, PANEL, column, 0)
        if TWO:
            state_b = state_tile(starts, D, DP, E, PANEL, column, 1)
        if NORMALISED:
            start_totals += place * F
            total = state_row(start_totals, D, DP, 0)
            if TWO:
                total_b = state_row(start_totals, D, DP, 1)
    length = tl.maximum(T, S)
    first = segment * chunks * C
    for at in tl.range(first, tl.minimum(first + chunks * C, length), C):
        real = real_keys(at, length - S, S, mask, mt, C, HAS_MASK)
        if HAS_DECAY:
            since, chunk = steps(decay, at, length - S, real, dt, C, SUMS)
            kept = power(chunk)
        # Features are used up one after the other: sums of them at once, and then as operands.
        x = tile(q, at, length - T, T, qt, C, D, DP, 0)
        q1 = x
        q2 = x
        if MAP_Q != 0 or FLOORED_Q:
            rows = at + tl.arange(0, C) >= 0
            q1, q2 = features(x.to(tl.float32), rows, MAP_Q, TWO, FLOORED_Q, D, DP)
        q1 = q1.to(OPERAND)
        q2 = q2.to(OPERAND)
        bottom = tl.zeros([C], tl.float32)
        if NORMALISED:
            bottom = tl.sum(q1.to(tl.float32) * total[None, :], 1)
            if TWO:
                bottom += tl.sum(q2.to(tl.float32) * total_b[None, :], 1)
            if HAS_DECAY:
                bottom = times(power(since), bottom)
        y = tile(k, at, length - S, S, kt, C, D, DP, 0)
        k1 = y
        k2 = y
        if MAP_K != 0 or FLOORED_K:
            k1, k2 = features(y.to(tl.float32), real, MAP_K, TWO, FLOORED_K, D, DP)
        if HAS_MASK:
            k1 = tl.where(real[:, None], k1, 0.0)
        k1 = k1.to(OPERAND)
        k2 = k2.to(OPERAND)
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
        # What is done with the scores comes first: then their decays need no registers any more.
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if TWO:
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        if HAS_DECAY:
            scores = times(inside(at, since, C, SUMS, True), scores)
        else:
            scores = tl.where(seen_in(at, C, True), scores, 0.0)
        scores = scores.to(OPERAND)
        row = tl.dot(q1, state.to(OPERAND), input_precision=PRECISION)
        if TWO:
            row = tl.dot(q2, state_b.to(OPERAND), row, input_precision=PRECISION)
        if HAS_DECAY:
            row = times(power(since)[:, None], row)
        values = tile(v, at, length - S, S, vt, C, E, PANEL, column)
        if HAS_MASK:
            values = tl.where(real[:, None], values, 0.0)
        values = values.to(OPERAND)
        row = tl.dot(scores, values, row, input_precision=PRECISION) * scale
        if NORMALISED:
            bottom += tl.sum(scores.to(tl.float32), 1)
            row *= inverse(bottom, minimum, epsilon)[:, None]
            if panel == 0:
                put_numbers(bottoms, at, length - T, T, bottom, C)
        put(out, at, length - T, T, row, C, E, PANEL, column)
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
    if WANTS_END and (segment == segments - 1) & (head % (H // HK) == 0):
        end += key_pair * (F * E)
        put_state(end, state, D, DP, E, PANEL, column, 0)
        if TWO:
            put_state(end, state_b, D, DP, E, PANEL, column, 1)
        if NORMALISED and panel == 0:
            end_total += key_pair * F
            put_state_row(end_total, total, D, DP, 0)
            if TWO:
                put_state_row(end_total, total_b, D, DP, 1)
