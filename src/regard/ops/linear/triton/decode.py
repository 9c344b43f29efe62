"""A few tokens after a state: the recurrence itself in float32, one program per panel of columns.

No products of tiles: what is read is the state, once, and it is written once.
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
from regard.ops.linear.triton.maps import features
from regard.ops.linear.triton.walk import FORGETS, LOG2E, times


@triton.jit
def _row(x, row, stride, column, count: tl.constexpr, WIDTH: tl.constexpr):
    """Row `row` of x [., count], from `column`; 0 where the row is negative."""
    at = column + tl.arange(0, WIDTH)
    there = (at < count) & (at * 0 + row >= 0)
    return tl.load(x + row * stride + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _mapped(
    x, MAP: tl.constexpr, TWO: tl.constexpr, FLOORED: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Features of one row, both blocks [DP]."""
    a, b = features(x[None, :], tl.arange(0, 1) >= 0, MAP, TWO, FLOORED, D, DP)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit(do_not_specialize=["T", "S"])
def tokens_kernel(
    q, k, v, decay, mask, start, start_total, out, bottoms, end, end_total,
    scale, minimum, epsilon,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, mb, mt,
    T, S,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    PANEL: tl.constexpr, MAP_Q: tl.constexpr, MAP_K: tl.constexpr,
    TWO: tl.constexpr, FLOORED_Q: tl.constexpr, FLOORED_K: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, HAS_START: tl.constexpr,
    NORMALISED: tl.constexpr, WANTS_END: tl.constexpr,
):  # fmt: skip
    """All tokens of one key head and its queries, token after token."""
    F: tl.constexpr = D * (2 if TWO else 1)
    PANELS: tl.constexpr = (E + PANEL - 1) // PANEL
    GROUP: tl.constexpr = H // HK
    panel = tl.program_id(0) % PANELS
    pair = (tl.program_id(0) // PANELS).to(tl.int64)
    batch = pair // HK
    key_head = pair % HK
    head = key_head * GROUP
    q += batch * qb + head * qh
    k += batch * kb + key_head * kh
    v += batch * vb + key_head * vh
    out += (batch * H + head) * T * E
    column = panel * PANEL
    state = tl.zeros([DP, PANEL], tl.float32)
    state_b = state
    total = tl.zeros([DP], tl.float32)
    total_b = total
    if HAS_START:
        state = state_tile(start + pair * (F * E), D, DP, E, PANEL, column, 0)
        if TWO:
            state_b = state_tile(start + pair * (F * E), D, DP, E, PANEL, column, 1)
        if NORMALISED:
            total = state_row(start_total + pair * F, D, DP, 0)
            if TWO:
                total_b = state_row(start_total + pair * F, D, DP, 1)
    length = tl.maximum(T, S)
    columns = column + tl.arange(0, PANEL)
    for at in tl.range(0, length):
        i = tl.cast(at - (length - T), tl.int64)
        j = tl.cast(at - (length - S), tl.int64)
        real = j >= 0
        if HAS_MASK:
            real = real & (tl.load(mask + batch * mb + j * mt, mask=real, other=0) != 0)
        if HAS_DECAY:
            step = tl.load(decay + batch * db + key_head * dh + j * dt, mask=real, other=0.0)
            kept = tl.exp2(tl.maximum(step.to(tl.float32), FORGETS) * LOG2E)
            state = times(kept, state)
            total = times(kept, total)
            if TWO:
                state_b = times(kept, state_b)
                total_b = times(kept, total_b)
        k1, k2 = _mapped(_row(k, tl.where(real, j, -1), kt, 0, D, DP), MAP_K, TWO, FLOORED_K, D, DP)
        k1 = tl.where(real, k1, 0.0)
        k2 = tl.where(real, k2, 0.0)
        value = _row(v, tl.where(real, j, -1), vt, column, E, PANEL)
        state += k1[:, None] * value[None, :]
        total += k1
        if TWO:
            state_b += k2[:, None] * value[None, :]
            total_b += k2
        if i >= 0:
            for member in tl.range(0, GROUP):
                x = _row(q + member * qh, i, qt, 0, D, DP)
                q1, q2 = _mapped(x, MAP_Q, TWO, FLOORED_Q, D, DP)
                row = tl.sum(q1[:, None] * state, 0)
                if TWO:
                    row += tl.sum(q2[:, None] * state_b, 0)
                row *= scale
                if NORMALISED:
                    bottom = tl.sum(q1 * total, 0)
                    if TWO:
                        bottom += tl.sum(q2 * total_b, 0)
                    row *= inverse(bottom, minimum, epsilon)
                    if panel == 0:
                        tl.store(bottoms + (batch * H + head + member) * T + i, bottom)
                place = out + (member * T + i) * E + columns
                tl.store(place, row.to(out.dtype.element_ty), mask=columns < E)
    if WANTS_END:
        put_state(end + pair * (F * E), state, D, DP, E, PANEL, column, 0)
        if TWO:
            put_state(end + pair * (F * E), state_b, D, DP, E, PANEL, column, 1)
        if NORMALISED and panel == 0:
            put_state_row(end_total + pair * F, total, D, DP, 0)
            if TWO:
                put_state_row(end_total + pair * F, total_b, D, DP, 1)
