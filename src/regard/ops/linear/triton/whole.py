"""Without a mask of time: every query reads the state after all keys. And the gradients of that.

    o_t = phi(q_t) S / phi(q_t) . z,        S = sum_j w_j phi(k_j) v_j^T

where w_j decays a key until the last one. The state itself, and the gradient of it, are the sums
over segments of the causal form (`forward.sums_kernel`, `backward.cotangents_kernel`).
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton.backward import of_rows
from regard.ops.linear.triton.forward import inverse, state_row, state_tile
from regard.ops.linear.triton.maps import chain, features
from regard.ops.linear.triton.walk import numbers, put, put_numbers, real_keys, tile, times


@triton.jit(do_not_specialize=["T", "places", "tiles"])
def read_kernel(
    q, states, totals, out, bottoms, scale, minimum, epsilon,
    qb, qh, qt, T, places, tiles,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    PANEL: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr,
    FLOORED: tl.constexpr, NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile of queries from the last of `places` states of their key head."""
    F: tl.constexpr = D * (2 if TWO else 1)
    PANELS: tl.constexpr = (E + PANEL - 1) // PANEL
    program = tl.program_id(0)
    panel = program % PANELS
    at = (program // PANELS) % tiles * C
    pair = program // (PANELS * tiles)
    batch = (pair // H).to(tl.int64)
    head = pair % H
    key_pair = batch * HK + head // (H // HK)
    column = panel * PANEL
    x = tile(q + batch * qb + head * qh, at, 0, T, qt, C, D, DP, 0)
    q1 = x
    q2 = x
    if MAP != 0 or FLOORED:
        q1, q2 = features(x.to(tl.float32), tl.arange(0, C) >= 0, MAP, TWO, FLOORED, D, DP)
    q1 = q1.to(OPERAND)
    state = states + (key_pair * places + places - 1) * (F * E)
    first = state_tile(state, D, DP, E, PANEL, column, 0).to(OPERAND)
    row = tl.dot(q1, first, input_precision=PRECISION)
    if TWO:
        q2 = q2.to(OPERAND)
        second = state_tile(state, D, DP, E, PANEL, column, 1).to(OPERAND)
        row = tl.dot(q2, second, row, input_precision=PRECISION)
    row = row * scale
    if NORMALISED:
        total = totals + (key_pair * places + places - 1) * F
        bottom = tl.sum(q1.to(tl.float32) * state_row(total, D, DP, 0)[None, :], 1)
        if TWO:
            bottom += tl.sum(q2.to(tl.float32) * state_row(total, D, DP, 1)[None, :], 1)
        row *= inverse(bottom, minimum, epsilon)[:, None]
        if panel == 0:
            put_numbers(bottoms + pair.to(tl.int64) * T, at, 0, T, bottom, C)
    put(out + pair.to(tl.int64) * T * E, at, 0, T, row, C, E, PANEL, column)


@triton.jit(do_not_specialize=["T", "places", "tiles"])
def readers_kernel(
    q, states, totals, grad, shares, losses, grad_q, scale,
    qb, qh, qt, gb, gh, gt, T, places, tiles,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr,
    FLOORED: tl.constexpr, NORMALISED: tl.constexpr, SCALED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries that read one state."""
    F: tl.constexpr = D * (2 if TWO else 1)
    at = tl.program_id(0) % tiles * C
    pair = tl.program_id(0) // tiles
    batch = (pair // H).to(tl.int64)
    head = pair % H
    key_pair = batch * HK + head // (H // HK)
    rows = pair.to(tl.int64) * T
    grad_n, grad_b = of_rows(
        grad + batch * gb + head * gh, shares + rows, losses + rows, scale,
        at, 0, T, gt, C, E, EP, 0, NORMALISED, SCALED,
    )  # fmt: skip
    n = grad_n.to(OPERAND)
    state = states + (key_pair * places + places - 1) * (F * E)
    total = totals + (key_pair * places + places - 1) * F
    first = state_tile(state, D, DP, E, EP, 0, 0).to(OPERAND)
    d1 = tl.dot(n, tl.trans(first), input_precision=PRECISION)
    d2 = d1
    if NORMALISED:
        d1 += grad_b[:, None] * state_row(total, D, DP, 0)[None, :]
    if TWO:
        second = state_tile(state, D, DP, E, EP, 0, 1).to(OPERAND)
        d2 = tl.dot(n, tl.trans(second), input_precision=PRECISION)
        if NORMALISED:
            d2 += grad_b[:, None] * state_row(total, D, DP, 1)[None, :]
    x = tile(q + batch * qb + head * qh, at, 0, T, qt, C, D, DP, 0).to(tl.float32)
    put(grad_q + rows * D, at, 0, T, chain(x, d1, d2, MAP, TWO, FLOORED, D, DP), C, D, DP, 0)


@triton.jit(do_not_specialize=["S", "places", "tiles"])
def writers_kernel(
    k, v, leaving, mask, states, totals, grad_k, grad_v, leaves,
    kb, kh, kt, vb, vh, vt, mb, mt, S, places, tiles,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    C: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr, FLOORED: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, NORMALISED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys from the gradient of the state after all of them.

    leaving [B HK, S]: their decays until then; leaves [B HK, S]: what of the state's gradient
    goes through a key, for the gradient of the decay.
    """
    F: tl.constexpr = D * (2 if TWO else 1)
    at = tl.program_id(0) % tiles * C
    pair = tl.program_id(0) // tiles
    batch = (pair // HK).to(tl.int64)
    head = pair % HK
    y = tile(k + batch * kb + head * kh, at, 0, S, kt, C, D, DP, 0)
    values = tile(v + batch * vb + head * vh, at, 0, S, vt, C, E, EP, 0)
    if HAS_MASK:
        mask += batch * mb
    real = real_keys(at, 0, S, mask, mt, C, HAS_MASK)
    k1, k2 = features(y.to(tl.float32), real, MAP, TWO, FLOORED, D, DP)
    if HAS_MASK:
        k1 = tl.where(real[:, None], k1, 0.0)
        values = tl.where(real[:, None], values, 0.0)
    k1 = k1.to(OPERAND)
    k2 = k2.to(OPERAND)
    values = values.to(OPERAND)
    place = pair.to(tl.int64) * places + places - 1
    state = states + place * (F * E)
    first = state_tile(state, D, DP, E, EP, 0, 0).to(OPERAND)
    d1 = tl.dot(values, tl.trans(first), input_precision=PRECISION)
    dv = tl.dot(k1, first, input_precision=PRECISION)
    d2 = d1
    if TWO:
        second = state_tile(state, D, DP, E, EP, 0, 1).to(OPERAND)
        d2 = tl.dot(values, tl.trans(second), input_precision=PRECISION)
        dv = tl.dot(k2, second, dv, input_precision=PRECISION)
    if NORMALISED:
        total = totals + place * F
        d1 += state_row(total, D, DP, 0)[None, :]
        if TWO:
            d2 += state_row(total, D, DP, 1)[None, :]
    if HAS_DECAY:
        weight = numbers(leaving + pair.to(tl.int64) * S, at, 0, S, 1, C)[:, None]
        d1 = times(weight, d1)
        d2 = times(weight, d2)
        dv = times(weight, dv)
        through = tl.sum(k1.to(tl.float32) * d1, 1)
        if TWO:
            through += tl.sum(k2.to(tl.float32) * d2, 1)
        put_numbers(leaves + pair.to(tl.int64) * S, at, 0, S, through, C)
    dx = chain(y.to(tl.float32), d1, d2, MAP, TWO, FLOORED, D, DP)
    if HAS_MASK:
        dx = tl.where(real[:, None], dx, 0.0)
        dv = tl.where(real[:, None], dv, 0.0)
    put(grad_k + pair.to(tl.int64) * S * D, at, 0, S, dx, C, D, DP, 0)
    put(grad_v + pair.to(tl.int64) * S * E, at, 0, S, dv, C, E, EP, 0)
