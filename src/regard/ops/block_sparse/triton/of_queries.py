"""The gradient of queries, over the same lists as the forward; and what keys need of queries.

With the weights p,

    dS_ir = p_ir (dO_i . v_r - delta_i),   delta_i = dO_i . O_i,   dq_i = scale sum_r dS_ir k_r
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.block_sparse.triton.tile import LOG2E, rows_at, visible
from regard.ops.block_sparse.triton.walk import (
    clear_start,
    clear_tile,
    level_one,
    list_of_queries,
    pooled_cut_seen,
    pooled_cut_tile,
    pooled_rows,
    pooled_tile,
    pooled_weight,
    rows_of_queries,
)


@triton.jit
def _of_rows(grad, out, lse):
    """delta_i, and log-sum-exp in bits: inf where nothing is seen or no loss looks."""
    grad = grad.to(tl.float32)
    idle = (tl.max(tl.abs(grad), 1) == 0) | (lse == float("-inf"))
    delta = tl.sum(tl.where(idle[:, None], 0.0, grad * out.to(tl.float32)), 1)
    return delta, tl.where(idle, float("inf"), lse * LOG2E)


@triton.jit
def _slopes(
    x, g, keys, values, factor, added, seen, shift, delta,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of a tile."""
    s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
    rest = tl.dot(g, tl.trans(values), input_precision=PRECISION)
    if PLAIN:
        p = tl.exp2(s * factor - (shift - added)[:, None])
    else:
        p = tl.exp2((s * factor - shift[:, None]) + added[None, :])
    ds = p * (rest - delta[:, None])
    if MASKED:  # 0 times a later key's product may be no 0
        ds = tl.where(seen, ds, 0.0)
    return ds


@triton.jit(do_not_specialize=["T", "S", "left", "right", "width", "tiles", "queries"])
def queries_kernel(
    q, k, v, bias, coarse_k, coarse_v, weights, entries, ends, scales,
    grad, out, lse, sums, grad_q,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sb, sh, scale,
    T, S, left, right, width, tiles, queries,
    H: tl.constexpr, HK: tl.constexpr, SHARE: tl.constexpr, PH: tl.constexpr,
    BIAS_HEADS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, NC: tl.constexpr,
    RANGES: tl.constexpr, POOLED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries [B, H, T, D]; delta and log-sum-exp in bits [B, H, T] for keys."""
    program = tl.program_id(0)
    user = program // tiles
    rest = tiles - 1 - program % tiles
    PER_BLOCK: tl.constexpr = (MEMBERS * BLOCK_Q + M - 1) // M
    USERS: tl.constexpr = H // MEMBERS
    b = user // USERS
    h0 = user % USERS * MEMBERS
    kv = h0 // (H // HK)
    i = rest // PER_BLOCK
    head, query, there, places = rows_of_queries(
        rest % PER_BLOCK, i, h0, T, qh, qt, M, MEMBERS, BLOCK_Q
    )
    x = rows_at(q + b.to(tl.int64) * qb, places, there, D, DP)
    places = head.to(tl.int64) * gh + query.to(tl.int64) * gt
    g = rows_at(grad + b.to(tl.int64) * gb, places, there, E, EP)
    row = (b * H + head).to(tl.int64) * T + query
    delta_row, shift_row = _of_rows(
        rows_at(grad + b.to(tl.int64) * gb, places, there, E, EP),
        rows_at(out, row * E, there, E, EP), tl.load(lse + row, mask=there, other=0.0),
    )  # fmt: skip
    tl.store(sums + row * 2, shift_row, mask=there)
    tl.store(sums + row * 2 + 1, delta_row, mask=there)
    own = scale
    if HAS_SCALES:
        own = tl.load(scales + b * sb + h0 * sh)
        if MEMBERS > 1:
            own = tl.load(scales + b * sb + head * sh)[:, None]
    factor = own * LOG2E
    k += b.to(tl.int64) * kb + kv * kh
    v += b.to(tl.int64) * vb + kv * vh
    if HAS_BIAS:
        bias += head_of(b * HK + kv, HK, BIAS_HEADS).to(tl.int64) * S
    position = (query + (S - T))[:, None]

    dq = tl.zeros([M, DP], tl.float32)
    begin, clear, stop, cuts, first, gap, of_gap, entries, ends = list_of_queries(
        entries, ends, b, h0, kv, i, width, queries, T, S, left, right,
        SHARE, PH, H, HK, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT, RANGES,
    )  # fmt: skip
    clear_tiles = clear if RANGES else tl.cdiv(clear * BLOCK_K, N)
    cut_tiles = stop if RANGES else tl.cdiv(stop * BLOCK_K, NC)
    start = clear_start(0, clear_tiles, entries, begin, BLOCK_K, N, RANGES)
    for n in tl.range(0, clear_tiles):
        keys, values, j, known = clear_tile(
            n, start, entries, clear, k, v, kt, vt, BLOCK_K, N, RANGES, D, DP, E, EP
        )
        start = clear_start(n + 1, clear_tiles, entries, begin, BLOCK_K, N, RANGES)
        added = 0.0
        if HAS_BIAS:
            added = tl.load(bias + j, mask=known, other=0.0) * LOG2E
        ds = _slopes(x, g, keys, values, factor, added, known[None, :], shift_row, delta_row,
                     not HAS_BIAS, not RANGES and BLOCK_K % N != 0, PRECISION)  # fmt: skip
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    for n in tl.range(0, cut_tiles):
        j, known = level_one(n, cuts, stop, first, gap, of_gap, BLOCK_K, NC, RANGES)
        known = known & (j < S)
        keys = rows_at(k, j.to(tl.int64) * kt, known, D, DP)
        values = rows_at(v, j.to(tl.int64) * vt, known, E, EP)
        seen = known[None, :] & visible(
            j[None, :], j[None, :], position, left, right, HAS_LEFT, HAS_RIGHT
        )
        added = 0.0
        if HAS_BIAS:
            added = tl.load(bias + j, mask=known, other=0.0) * LOG2E
        ds = _slopes(x, g, keys, values, factor, added, seen, shift_row, delta_row,
                     not HAS_BIAS, True, PRECISION)  # fmt: skip
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    if POOLED:
        coarse_k = pooled_rows(coarse_k, b * HK + kv, S, D)
        coarse_v = pooled_rows(coarse_v, b * HK + kv, S, E)
        if HAS_BIAS:
            weights = pooled_rows(weights, head_of(b * HK + kv, HK, BIAS_HEADS), S, 1)
        for power in tl.range(1, 4):
            at = tl.load(ends + power - 1)
            count = tl.load(ends + power) - at
            for n in tl.range(0, tl.cdiv(count * (BLOCK_K >> power), NC)):
                keys, values, rows, known = pooled_tile(
                    n, entries + at, count, power, coarse_k, coarse_v, S,
                    BLOCK_K, NC, D, DP, E, EP,
                )  # fmt: skip
                added = pooled_weight(power, weights, rows, known, HAS_BIAS)
                ds = _slopes(x, g, keys, values, factor, added, known[None, :], shift_row,
                             delta_row, not HAS_BIAS, True, PRECISION)  # fmt: skip
                dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
        at = tl.load(ends + 4)
        count = tl.load(ends + 7) - at
        for n in tl.range(0, tl.cdiv(count * (BLOCK_K // 2), NC)):
            keys, values, rows, token, level, known = pooled_cut_tile(
                n, entries + at, count, coarse_k, coarse_v, S, BLOCK_K, NC, D, DP, E, EP
            )
            added, seen = pooled_cut_seen(
                rows, token, level, known, weights, position, S, left, right,
                HAS_BIAS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            ds = _slopes(x, g, keys, values, factor, added, seen, shift_row, delta_row,
                         False, True, PRECISION)  # fmt: skip
            dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    channels = tl.arange(0, DP)
    inside = there[:, None] & (channels < D)[None, :]
    dq = dq * own
    tl.store(
        grad_q + row[:, None] * D + channels[None, :], dq.to(grad_q.dtype.element_ty), mask=inside
    )
