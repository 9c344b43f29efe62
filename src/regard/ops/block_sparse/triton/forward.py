"""Attention of a tile of queries to the blocks of its list, and the sum of parts of a list.

    s_ir = scale q_i . k_r + b_r,   o_i = sum_r exp2(s_ir - top_i) v_r / total_i

with scores in bits (base 2). One program has M rows: queries of one block and, where heads share a
list, of several heads. It walks over what is wholly seen at level 1, then over what is cut there,
then over pooled rows likewise; only what is cut knows of positions.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.block_sparse.triton.tile import LN2, LOG2E, rows_at, visible
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
def _online(
    s, factor, of_row, added, seen, top, total,
    PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights of a tile, the new top and total, and by what earlier sums are to be multiplied.

    PLAIN: `added` is one number for all keys; else a row. `factor` is one number or a column, and
    `of_row` the same as one number or a vector.
    """
    if PLAIN and not MASKED:
        new = tl.maximum(top, tl.max(s, 1) * of_row + added)
        p = tl.exp2(s * factor - (new - added)[:, None])
        shrink = tl.exp2(top - new)
    else:
        s = s * factor + added if PLAIN else s * factor + added[None, :]
        if MASKED:
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
    return p, new, total * shrink + tl.sum(p, 1), shrink


@triton.jit(do_not_specialize=["T", "S", "left", "right", "width", "tiles", "queries"])
def forward_kernel(
    q, k, v, bias, coarse_k, coarse_v, weights, entries, ends, scales,
    out, lse, part_out, part_top, part_total,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, sb, sh, scale,
    T, S, left, right, width, tiles, queries,
    H: tl.constexpr, HK: tl.constexpr, SHARE: tl.constexpr, PH: tl.constexpr,
    BIAS_HEADS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, NC: tl.constexpr, SPLITS: tl.constexpr,
    RANGES: tl.constexpr, POOLED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr, FLIP: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [B, H, T, E] and log-sum-exp [B, H, T]; with SPLITS, parts of them in float32."""
    split = tl.program_id(0) % SPLITS
    program = tl.program_id(0) // SPLITS
    user = program // tiles  # a head, or the heads that share a list
    rest = tiles - 1 - program % tiles  # the last see the most
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
    factor = scale * LOG2E
    if HAS_SCALES:
        factor = tl.load(scales + b * sb + h0 * sh) * LOG2E
        if MEMBERS > 1:
            factor = tl.load(scales + b * sb + head * sh)[:, None] * LOG2E
    k += b.to(tl.int64) * kb + kv * kh
    v += b.to(tl.int64) * vb + kv * vh
    if HAS_BIAS:
        bias += head_of(b * HK + kv, HK, BIAS_HEADS).to(tl.int64) * S
    position = (query + (S - T))[:, None]
    if FLIP:  # factors are positive: a row's scores keep their order when multiplied
        sign = tl.where(factor < 0, -1.0, 1.0)
        x = (x * sign).to(x.dtype)
        factor = tl.abs(factor)
    of_row = factor
    if HAS_SCALES and MEMBERS > 1:
        of_row = tl.reshape(factor, [M])

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, EP], tl.float32)
    begin, clear, stop, cuts, first, gap, of_gap, entries, ends = list_of_queries(
        entries, ends, b, h0, kv, i, width, queries, T, S, left, right,
        SHARE, PH, H, HK, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT, RANGES,
    )  # fmt: skip
    clear_tiles = clear if RANGES else tl.cdiv(clear * BLOCK_K, N)
    cut_tiles = stop if RANGES else tl.cdiv(stop * BLOCK_K, NC)
    start = clear_start(split, clear_tiles, entries, begin, BLOCK_K, N, RANGES)
    for n in tl.range(split, clear_tiles, SPLITS):
        keys, values, j, known = clear_tile(
            n, start, entries, clear, k, v, kt, vt, BLOCK_K, N, RANGES, D, DP, E, EP
        )
        start = clear_start(n + SPLITS, clear_tiles, entries, begin, BLOCK_K, N, RANGES)
        s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
        added = 0.0
        if HAS_BIAS:
            added = tl.load(bias + j, mask=known, other=0.0) * LOG2E
        p, top, total, shrink = _online(
            s, factor, of_row, added, known[None, :],
            top, total, not HAS_BIAS, not RANGES and BLOCK_K % N != 0,
        )  # fmt: skip
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
    for n in tl.range(split, cut_tiles, SPLITS):
        j, known = level_one(n, cuts, stop, first, gap, of_gap, BLOCK_K, NC, RANGES)
        known = known & (j < S)
        keys = rows_at(k, j.to(tl.int64) * kt, known, D, DP)
        values = rows_at(v, j.to(tl.int64) * vt, known, E, EP)
        s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
        seen = known[None, :] & visible(
            j[None, :], j[None, :], position, left, right, HAS_LEFT, HAS_RIGHT
        )
        added = 0.0
        if HAS_BIAS:
            added = tl.load(bias + j, mask=known, other=0.0) * LOG2E
        p, top, total, shrink = _online(
            s, factor, of_row, added, seen, top, total, not HAS_BIAS, True
        )
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
    if POOLED:
        coarse_k = pooled_rows(coarse_k, b * HK + kv, S, D)
        coarse_v = pooled_rows(coarse_v, b * HK + kv, S, E)
        if HAS_BIAS:
            weights = pooled_rows(weights, head_of(b * HK + kv, HK, BIAS_HEADS), S, 1)
        for power in tl.range(1, 4):
            at = tl.load(ends + power - 1)
            count = tl.load(ends + power) - at
            for n in tl.range(split, tl.cdiv(count * (BLOCK_K >> power), NC), SPLITS):
                keys, values, rows, known = pooled_tile(
                    n, entries + at, count, power, coarse_k, coarse_v, S,
                    BLOCK_K, NC, D, DP, E, EP,
                )  # fmt: skip
                s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
                added = pooled_weight(power, weights, rows, known, HAS_BIAS)
                p, top, total, shrink = _online(
                    s, factor, of_row, added, known[None, :], top, total, not HAS_BIAS, True
                )
                sums = tl.dot(
                    p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION
                )
        at = tl.load(ends + 4)
        count = tl.load(ends + 7) - at
        for n in tl.range(split, tl.cdiv(count * (BLOCK_K // 2), NC), SPLITS):
            keys, values, rows, token, level, known = pooled_cut_tile(
                n, entries + at, count, coarse_k, coarse_v, S, BLOCK_K, NC, D, DP, E, EP
            )
            s = tl.dot(x, tl.trans(keys), input_precision=PRECISION)
            added, seen = pooled_cut_seen(
                rows, token, level, known, weights, position, S, left, right,
                HAS_BIAS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            p, top, total, shrink = _online(s, factor, of_row, added, seen, top, total, False, True)
            sums = tl.dot(
                p.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION
            )
    row = (b * H + head).to(tl.int64) * T + query
    channels = tl.arange(0, EP)
    target = row[:, None] * E + channels[None, :]
    inside = there[:, None] & (channels < E)[None, :]
    if SPLITS == 1:
        some = total > 0
        o = sums * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
        tl.store(out + target, o.to(out.dtype.element_ty), mask=inside)
        whole_lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
        tl.store(lse + row, whole_lse, mask=there)
    else:
        of_split = split.to(tl.int64) * (tl.num_programs(0) // (SPLITS * tiles) * MEMBERS) * T
        tl.store(part_out + of_split * E + target, sums, mask=inside)
        tl.store(part_top + of_split + row, top, mask=there)
        tl.store(part_total + of_split + row, total, mask=there)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    out, lse, part_out, part_top, part_total, rows,
    E: tl.constexpr, EP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row from its parts."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, EP)
    top = float("-inf")
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(part_top + split * rows + row))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    sums = tl.zeros([EP], tl.float32)
    for split in tl.static_range(SPLITS):
        share = tl.exp2(tl.load(part_top + split * rows + row) - safe)
        total += share * tl.load(part_total + split * rows + row)
        part = part_out + (split * rows + row) * E + channels
        sums += share * tl.load(part, mask=channels < E, other=0.0)
    some = total > 0
    o = sums * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    tl.store(out + row * E + channels, o.to(out.dtype.element_ty), mask=channels < E)
    whole = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + row, whole)
