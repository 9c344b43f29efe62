"""The forward of maps that make two blocks of features, without decay and with a normaliser.

    o_i = (phi(q_i) S_n + sum_(j <= i, in n) (phi(q_i) . phi(k_j)) v_j) / denominator

with S_n the state before segment n, that of i. `forward` serves such maps, too; here, features are
the larger part of the work, and these kernels are cut for that. Whatever tensor cores read is
loaded, handed on from the turn before, or the second operand: a first operand that is computed
where it is used stays in registers, and the compiler then waits for every single product. So states
are transposed, and the features of queries are formed a turn ahead.

A state of two blocks of up to 64 features is carried from chunk to chunk (`narrow_outputs_kernel`).
That of two blocks of 128 would take all registers of a program: segments are short then, and the
outputs of a tile of queries come from the keys of its own segment as in exact attention
(`wide_outputs_kernel`).
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
    state_row,
    state_tile,
)
from regard.ops.linear.triton.maps import both
from regard.ops.linear.triton.walk import put_numbers, real_keys, seen_in


@triton.jit
def tile(x, first, offset, count, stride, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
         column):  # fmt: skip
    """`walk.tile` by addresses that differ from chunk to chunk.

    Those of a chunk, less its first, are the same for all chunks: the compiler would keep them, and
    have no registers left for them.
    """
    rows = first - offset + tl.arange(0, C)
    columns = column + tl.arange(0, WP)
    inside = ((rows >= 0) & (rows < count))[:, None]
    if W % WP != 0:
        inside = inside & (columns < W)[None, :]
    places = (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    return tl.load(x + places, mask=inside, other=0.0)


@triton.jit
def put(x, first, offset, count, values, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
        column):  # fmt: skip
    """Writes what `tile` would read, to a contiguous x."""
    rows = first - offset + tl.arange(0, C)
    columns = column + tl.arange(0, WP)
    inside = ((rows >= 0) & (rows < count))[:, None]
    if W % WP != 0:
        inside = inside & (columns < W)[None, :]
    places = (rows.to(tl.int64) * W)[:, None] + columns[None, :]
    tl.store(x + places, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _weights(weight, D: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr):
    """A linear map [DP, DP] of rows, 0 outside of D."""
    at = tl.arange(0, DP)
    there = (at < D)[:, None] & (at < D)[None, :]
    found = tl.load(weight + at[:, None] * D + at[None, :], mask=there, other=0.0)
    return found.to(OPERAND)


@triton.jit
def _of_keys(
    k, v, mask, at, offset, S, kt, vt, mt, column,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, PANEL: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr, FLOORED: tl.constexpr, HAS_MASK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Both blocks of features of keys in float32, and values; 0 where there is no key."""
    y, values, real = _keys(
        k, v, mask, at, offset, S, kt, vt, mt, column, D, DP, E, PANEL, C, HAS_MASK
    )
    a, b = both(y.to(tl.float32), real, MAP, FLOORED, D, DP, tl.bfloat16 == OPERAND)
    return a, b, values.to(OPERAND)


@triton.jit
def _keys(
    k, v, mask, at, offset, S, kt, vt, mt, column, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, PANEL: tl.constexpr, C: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Keys and values as they are, 0 where there is no key; and where there is one."""
    y = tile(k, at, offset, S, kt, C, D, DP, 0)
    values = tile(v, at, offset, S, vt, C, E, PANEL, column)
    real = real_keys(at, offset, S, mask, mt, C, HAS_MASK)
    if HAS_MASK:
        y = tl.where(real[:, None], y, 0.0)
        values = tl.where(real[:, None], values, 0.0)
    return y, values, real


@triton.jit
def _of_queries(
    q, weight, at, offset, T, qt, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    MAP: tl.constexpr, FLOORED: tl.constexpr, LEARNED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both blocks of features of queries in float32; LEARNED: of queries times a weight."""
    x = tile(q, at, offset, T, qt, C, D, DP, 0)
    z = x.to(tl.float32)
    if LEARNED:
        z = tl.dot(x.to(OPERAND), weight, input_precision=PRECISION)
    short: tl.constexpr = tl.bfloat16 == OPERAND and not LEARNED
    return both(z, at + tl.arange(0, C) >= 0, MAP, FLOORED, D, DP, short)


@triton.jit
def _spread(x, C: tl.constexpr, SPREAD: tl.constexpr, DP: tl.constexpr):
    """Sums of every SPREAD-th row of x [C, DP]: those of one thread, which waits for no other."""
    return tl.sum(tl.reshape(x, [C // SPREAD, SPREAD, DP]), 0)


@triton.jit
def _paired(x, C: tl.constexpr, DP: tl.constexpr):
    """The same [C / 2, DP] of what a product has left: a thread has rows 8 apart."""
    return tl.reshape(tl.sum(tl.reshape(x, [C // 16, 2, 8, DP]), 1), [C // 2, DP])


@triton.jit
def _first_row(x, SPREAD: tl.constexpr):
    """x [DP] in the first of SPREAD rows, 0 in the others."""
    return tl.where((tl.arange(0, SPREAD) == 0)[:, None], x[None, :], 0.0)


@triton.jit(do_not_specialize=["S", "offset", "places", "segments", "kept", "skip", "chunks"])
def twofold_sums_kernel(
    k, v, map_k, mask, start, start_total, sums, totals, mapped,
    kb, kh, kt, vb, vh, vt, wk, mb, mt,
    S, offset, places, segments, kept, skip, chunks,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, PANEL: tl.constexpr,
    C: tl.constexpr, SPREAD: tl.constexpr, MAP_K: tl.constexpr, FLOORED_K: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_START: tl.constexpr, LEARNED_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What segments skip, skip + 1 .. of keys add to the state.

    sums [B HK, places, F, E], totals [.., F]: the last `kept` places are for the first segments,
    of which there are no more but with LEARNED_K: keys times map_k then go to mapped [B HK, S, D].
    With HAS_START the only segment adds to the last place of start and start_total, which have a
    place for every segment up to it.
    """
    F: tl.constexpr = 2 * D
    PANELS: tl.constexpr = (E + PANEL - 1) // PANEL
    program = tl.program_id(0)
    panel = program % PANELS
    segment = (program // PANELS) % segments
    pair = program // (PANELS * segments)
    batch = (pair // HK).to(tl.int64)
    head = pair % HK
    k += batch * kb + head * kh
    v += batch * vb + head * vh
    if HAS_MASK:
        mask += batch * mb
    if LEARNED_K:
        map_k = _weights(map_k + head * wk, D, DP, OPERAND)
        mapped += pair.to(tl.int64) * S * D
    column = panel * PANEL
    state = tl.zeros([PANEL, DP], tl.float32)
    state_b = state
    total = tl.zeros([SPREAD, DP], tl.float32)
    total_b = total
    if HAS_START:
        place = pair.to(tl.int64) * (skip + 1) + skip
        start += place * (F * E)
        state = tl.trans(state_tile(start, D, DP, E, PANEL, column, 0))
        state_b = tl.trans(state_tile(start, D, DP, E, PANEL, column, 1))
        start_total += place * F
        total = _first_row(state_row(start_total, D, DP, 0), SPREAD)
        total_b = _first_row(state_row(start_total, D, DP, 1), SPREAD)
    first = (skip + segment) * chunks * C
    for at in tl.range(first, tl.minimum(first + chunks * C, S + offset), C):
        if LEARNED_K:
            y, values, real = _keys(
                k, v, mask, at, offset, S, kt, vt, mt, column, D, DP, E, PANEL, C, HAS_MASK
            )
            z = tl.dot(y.to(OPERAND), map_k, input_precision=PRECISION).to(OPERAND)
            if panel == 0:
                put(mapped, at, offset, S, z, C, D, DP, 0)
            a, b = both(z.to(tl.float32), real, MAP_K, FLOORED_K, D, DP, tl.bfloat16 == OPERAND)
            values = values.to(OPERAND)
            total += _paired(a, C, DP)
            total_b += _paired(b, C, DP)
        else:
            a, b, values = _of_keys(
                k, v, mask, at, offset, S, kt, vt, mt, column, D, DP, E, PANEL, C, MAP_K,
                FLOORED_K, HAS_MASK, OPERAND,
            )  # fmt: skip
            total += _spread(a, C, SPREAD, DP)
            total_b += _spread(b, C, SPREAD, DP)
        turned = tl.trans(values)
        state = tl.dot(turned, a.to(OPERAND), state, input_precision=PRECISION)
        state_b = tl.dot(turned, b.to(OPERAND), state_b, input_precision=PRECISION)
    place = pair.to(tl.int64) * places + places - kept + segment
    sums += place * (F * E)
    if segment < kept:
        put_state(sums, tl.trans(state), D, DP, E, PANEL, column, 0)
        put_state(sums, tl.trans(state_b), D, DP, E, PANEL, column, 1)
    if (segment < kept) & (panel == 0):
        totals += place * F
        put_state_row(totals, tl.sum(total, 0), D, DP, 0)
        put_state_row(totals, tl.sum(total_b, 0), D, DP, 1)


@triton.jit(do_not_specialize=["T", "S", "segments", "chunks"])
def narrow_outputs_kernel(
    q, k, v, map_q, mask, starts, start_totals, out, bottoms, end, end_total,
    scale, minimum, epsilon,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, wq, mb, mt,
    T, S, segments, chunks,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    PANEL: tl.constexpr, C: tl.constexpr, SPREAD: tl.constexpr,
    MAP_Q: tl.constexpr, MAP_K: tl.constexpr, FLOORED_Q: tl.constexpr, FLOORED_K: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_START: tl.constexpr, WANTS_END: tl.constexpr,
    LEARNED_Q: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a segment of queries; the last segment leaves the last state in `end`.

    bottoms [B H, T]: sums of weights as they are, for the backward.
    """
    F: tl.constexpr = 2 * D
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
    if HAS_MASK:
        mask += batch * mb
    if LEARNED_Q:
        map_q = _weights(map_q + head * wq, D, DP, OPERAND)
    out += pair.to(tl.int64) * T * E
    bottoms += pair.to(tl.int64) * T
    column = panel * PANEL
    state = tl.zeros([PANEL, DP], tl.float32)
    state_b = state
    total = tl.zeros([SPREAD, DP], tl.float32)
    total_b = total
    if HAS_START:
        place = key_pair * segments + segment
        starts += place * (F * E)
        state = tl.trans(state_tile(starts, D, DP, E, PANEL, column, 0))
        state_b = tl.trans(state_tile(starts, D, DP, E, PANEL, column, 1))
        # In equal shares: as operands they are rounded, each by itself.
        share = tl.full([SPREAD, 1], 1.0 / SPREAD, tl.float32)
        start_totals += place * F
        total = share * state_row(start_totals, D, DP, 0)[None, :]
        total_b = share * state_row(start_totals, D, DP, 1)[None, :]
    length = tl.maximum(T, S)
    first = segment * chunks * C
    q1, q2 = _of_queries(
        q, map_q, first, length - T, T, qt, C, D, DP, MAP_Q, FLOORED_Q, LEARNED_Q, OPERAND,
        PRECISION,
    )  # fmt: skip
    q1 = q1.to(OPERAND)
    q2 = q2.to(OPERAND)
    for at in tl.range(first, tl.minimum(first + chunks * C, length), C):
        a, b, values = _of_keys(
            k, v, mask, at, length - S, S, kt, vt, mt, column, D, DP, E, PANEL, C, MAP_K, FLOORED_K,
            HAS_MASK, OPERAND,
        )  # fmt: skip
        more = _spread(a, C, SPREAD, DP)
        more_b = _spread(b, C, SPREAD, DP)
        k1 = a.to(OPERAND)
        k2 = b.to(OPERAND)
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        row = tl.dot(q1, tl.trans(state.to(OPERAND)), input_precision=PRECISION)
        row = tl.dot(q2, tl.trans(state_b.to(OPERAND)), row, input_precision=PRECISION)
        earlier = tl.dot(q1, tl.trans(total.to(OPERAND)), input_precision=PRECISION)
        earlier = tl.dot(q2, tl.trans(total_b.to(OPERAND)), earlier, input_precision=PRECISION)
        scores = tl.where(seen_in(at, C, True), scores, 0.0)
        bottom = tl.sum(earlier, 1) + tl.sum(scores, 1)
        row = tl.dot(scores.to(OPERAND), values, row, input_precision=PRECISION)
        row *= (scale * inverse(bottom, minimum, epsilon))[:, None]
        if panel == 0:
            put_numbers(bottoms, at, length - T, T, bottom, C)
        put(out, at, length - T, T, row, C, E, PANEL, column)
        turned = tl.trans(values)
        state = tl.dot(turned, k1, state, input_precision=PRECISION)
        state_b = tl.dot(turned, k2, state_b, input_precision=PRECISION)
        total += more
        total_b += more_b
        q1, q2 = _of_queries(
            q, map_q, at + C, length - T, T, qt, C, D, DP, MAP_Q, FLOORED_Q, LEARNED_Q, OPERAND,
            PRECISION,
        )  # fmt: skip
        q1 = q1.to(OPERAND)
        q2 = q2.to(OPERAND)
    if WANTS_END and (segment == segments - 1) & (head % (H // HK) == 0):
        end += key_pair * (F * E)
        put_state(end, tl.trans(state), D, DP, E, PANEL, column, 0)
        put_state(end, tl.trans(state_b), D, DP, E, PANEL, column, 1)
        if panel == 0:
            end_total += key_pair * F
            put_state_row(end_total, tl.sum(total, 0), D, DP, 0)
            put_state_row(end_total, tl.sum(total_b, 0), D, DP, 1)


@triton.jit(do_not_specialize=["T", "S", "segments", "tiles"])
def wide_outputs_kernel(
    q, k, v, map_q, mask, starts, start_totals, out, bottoms,
    scale, minimum, epsilon,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, wq, mb, mt,
    T, S, segments, tiles,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    PANEL: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr,
    MAP_Q: tl.constexpr, MAP_K: tl.constexpr, FLOORED_Q: tl.constexpr, FLOORED_K: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_START: tl.constexpr, LEARNED_Q: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of C queries, a tile of which there are `tiles` in a segment."""
    F: tl.constexpr = 2 * D
    PANELS: tl.constexpr = (E + PANEL - 1) // PANEL
    program = tl.program_id(0)
    panel = program % PANELS
    number = (program // PANELS) % (segments * tiles)
    pair = program // (PANELS * segments * tiles)
    segment = number // tiles
    at = number * C
    batch = (pair // H).to(tl.int64)
    head = pair % H
    key_head = head // (H // HK)
    key_pair = batch * HK + key_head
    q += batch * qb + head * qh
    k += batch * kb + key_head * kh
    v += batch * vb + key_head * vh
    if HAS_MASK:
        mask += batch * mb
    if LEARNED_Q:
        map_q = _weights(map_q + head * wq, D, DP, OPERAND)
    column = panel * PANEL
    length = tl.maximum(T, S)
    a, b = _of_queries(
        q, map_q, at, length - T, T, qt, C, D, DP, MAP_Q, FLOORED_Q, LEARNED_Q, OPERAND, PRECISION
    )
    q1 = a.to(OPERAND)
    q2 = b.to(OPERAND)
    row = tl.zeros([C, PANEL], tl.float32)
    bottom = tl.zeros([C], tl.float32)
    if HAS_START:
        place = key_pair * segments + segment
        start_totals += place * F
        a *= state_row(start_totals, D, DP, 0)[None, :]
        b *= state_row(start_totals, D, DP, 1)[None, :]
        bottom = tl.sum(a + b, 1)
        starts += place * (F * E)
        state = state_tile(starts, D, DP, E, PANEL, column, 0).to(OPERAND)
        row = tl.dot(q1, state, row, input_precision=PRECISION)
        state = state_tile(starts, D, DP, E, PANEL, column, 1).to(OPERAND)
        row = tl.dot(q2, state, row, input_precision=PRECISION)
    positions = at + tl.arange(0, C)
    for now in tl.range(segment * tiles * C, tl.minimum(at + C, length), KEYS):
        k1, k2, values = _of_keys(
            k, v, mask, now, length - S, S, kt, vt, mt, column, D, DP, E, PANEL, KEYS, MAP_K,
            FLOORED_K, HAS_MASK, OPERAND,
        )  # fmt: skip
        scores = tl.dot(q1, tl.trans(k1.to(OPERAND)), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2.to(OPERAND)), scores, input_precision=PRECISION)
        seen = positions[:, None] >= (now + tl.arange(0, KEYS))[None, :]
        scores = tl.where(seen, scores, 0.0)
        bottom += tl.sum(scores, 1)
        row = tl.dot(scores.to(OPERAND), values, row, input_precision=PRECISION)
    row *= (scale * inverse(bottom, minimum, epsilon))[:, None]
    if panel == 0:
        put_numbers(bottoms + pair.to(tl.int64) * T, at, length - T, T, bottom, C)
    put(out + pair.to(tl.int64) * T * E, at, length - T, T, row, C, E, PANEL, column)
