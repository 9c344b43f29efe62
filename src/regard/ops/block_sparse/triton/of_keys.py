"""Gradients of keys, values and biases, over the transposed lists; no two programs add to one.

    dv_r = sum_i p_ir dO_i,   dk_r = scale sum_i dS_ir q_i,   db_r = sum_i dS_ir

One program has rows of one block of keys at one level, and walks over the queries that attend to
it: a fixed order. Keys are the rows of a tile here, so that weights stay in registers as the first
operand of the products they go into. Level 1 comes last: it hands what pooled rows got to their
tokens, each its share.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.block_sparse.triton.tile import (
    LOG2E,
    first_pooled_row,
    plan_head,
    queries_in_reach,
    rows_at,
    tile_at,
    visible,
    weight_of_group,
)


@triton.jit
def _pairs(both, M: tl.constexpr):
    """The two columns of [M, 4] whose last two repeat the first."""
    once, _ = tl.split(tl.permute(tl.reshape(both, [M, 2, 2]), 0, 2, 1))
    return tl.split(once)


@triton.jit
def _rows_from(sums, first, M: tl.constexpr):
    """Log-sum-exp in bits and delta of M queries from `first` on.

    Asked for twice, to be as many numbers as threads: of fewer, the compiler has each thread load
    one by one what its part of a product needs, 32 loads instead of one.
    """
    places = tl.arange(0, M)[:, None] * 2 + tl.arange(0, 4)[None, :] % 2
    return _pairs(tl.load(sums + first * 2 + places), M)


@triton.jit
def _rows_at(sums, query, there, M: tl.constexpr, HALF: tl.constexpr):
    """The same of any M queries; inf, for no weight, where they are not there."""
    if HALF:
        places = query[:, None] * 2 + tl.arange(0, 4)[None, :] % 2
        shift, delta = _pairs(tl.load(sums + places, mask=there[:, None], other=0.0), M)
        shift = tl.where(there, shift, float("inf"))
    else:  # there are no registers left
        shift = tl.load(sums + query * 2, mask=there, other=float("inf"))
        delta = tl.load(sums + query * 2 + 1, mask=there, other=0.0)
    return shift, delta


@triton.jit
def _queries_of(
    n, entries, count, first, gap, of_gap, T,
    MEMBERS: tl.constexpr, BLOCK_Q: tl.constexpr, M: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Members of the group and queries of tile n of `count` blocks; and which are there."""
    WIDTH: tl.constexpr = MEMBERS * BLOCK_Q
    row = n * M + tl.arange(0, M)
    at = row // WIDTH
    there = at < count
    if RANGES:
        block = first + at + tl.where(at >= gap, of_gap, 0)
    else:
        block = tl.load(entries + at, mask=there, other=0) >> 4
    member = row % WIDTH // BLOCK_Q
    query = block * BLOCK_Q + row % BLOCK_Q
    return member, query, there & (query < T)


@triton.jit
def _clear_queries(
    n, tiles, entries, begin,
    MEMBERS: tl.constexpr, BLOCK_Q: tl.constexpr, M: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """The same where tiles are stretches of blocks: one member, the first of M queries.

    Asked for a turn ahead, as `clear_start` is.
    """
    PER_BLOCK: tl.constexpr = MEMBERS * BLOCK_Q // M
    n = tl.maximum(tl.minimum(n, tiles - 1), 0)
    if RANGES:
        block = begin + n // PER_BLOCK
    else:
        block = tl.load(entries + n // PER_BLOCK, mask=tiles > 0, other=0) >> 4
    row = n % PER_BLOCK * M
    return row // BLOCK_Q, block * BLOCK_Q + row % BLOCK_Q


@triton.jit
def _add(
    dk, dv, column, keys, values, x, g, factor, own, added, shift, delta, seen,
    MASKED: tl.constexpr, COLUMN: tl.constexpr, PLAIN: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of queries: `own` is their scale, a number or a row."""
    s = tl.dot(keys, tl.trans(x), input_precision=PRECISION)
    if PLAIN:
        p = tl.exp2(s * factor - shift[None, :])
    else:
        p = tl.exp2((s * factor - shift[None, :]) + added)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    rest = tl.dot(values, tl.trans(g), input_precision=PRECISION)
    ds = p * (rest - delta[None, :])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    if COLUMN:
        column += tl.sum(ds, 1)
    if SCALED:
        ds = ds * own
    dk = tl.dot(ds.to(x.dtype), x, dk, input_precision=PRECISION)
    return dk, dv, column


@triton.jit
def _handed_level(
    dk, dv, column, coarse_dk, coarse_dv, coarse_db, coarse_k, coarse_v, bias, weights,
    keys, values, j, known, S, LEVEL: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    HAS_BIAS: tl.constexpr, OF_BIAS: tl.constexpr,
):  # fmt: skip
    """Adds what tokens j get from the pooled rows of one level."""
    rows = first_pooled_row(LEVEL, S) + j // LEVEL
    if HAS_BIAS:
        weight = tl.load(weights + rows, mask=known, other=0.0)
        own = tl.load(bias + j, mask=known, other=float("-inf")) * LOG2E
        empty = weight == float("-inf")
        share = tl.exp2(own - tl.where(empty, 0.0, weight))
        share = tl.where(empty, 0.0, share)
    else:
        share = tl.exp2(-weight_of_group(LEVEL, j // LEVEL * LEVEL, S))
    more_k = rows_at(coarse_dk, rows.to(tl.int64) * D, known, D, DP)
    more_v = rows_at(coarse_dv, rows.to(tl.int64) * E, known, E, EP)
    dk += share[:, None] * more_k
    dv += share[:, None] * more_v
    if OF_BIAS:
        mean_k = rows_at(coarse_k, rows.to(tl.int64) * D, known, D, DP).to(tl.float32)
        mean_v = rows_at(coarse_v, rows.to(tl.int64) * E, known, E, EP).to(tl.float32)
        turned = tl.load(coarse_db + rows, mask=known, other=0.0)
        turned += tl.sum(more_k * (keys.to(tl.float32) - mean_k), 1)
        turned += tl.sum(more_v * (values.to(tl.float32) - mean_v), 1)
        column += share * turned
    return dk, dv, column


@triton.jit
def _blocks_of_level(ends, of_next, PLANS: tl.constexpr, POWER: tl.constexpr):
    """How many blocks of a level > 1 the lists of all heads of one block of keys have."""
    some = 0
    for member in tl.static_range(PLANS):
        at = ends + member * of_next
        some += tl.load(at + POWER) - tl.load(at + POWER - 1)
        some += tl.load(at + POWER + 4) - tl.load(at + POWER + 3)
    return some


@triton.jit
def _handed(
    dk, dv, column, coarse_dk, coarse_dv, coarse_db, coarse_k, coarse_v, bias, weights,
    keys, values, j, known, ends, of_plan, of_next, S,
    PLANS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, OF_BIAS: tl.constexpr,
):  # fmt: skip
    """Adds what tokens j get from the pooled rows that they are in.

    With shares s_t, the mean is sum s_t k_t and its weight b_r = log sum exp b_t, so that
    db_t = s_t (db_r + dk_r . (k_t - k_r) + dv_r . (v_t - v_r)).
    """
    for power in tl.static_range(1, 4):
        if BLOCK_K % (1 << power) == 0:  # noqa: SIM102 - known when it is compiled
            if _blocks_of_level(ends + of_plan, of_next, PLANS, power) > 0:
                dk, dv, column = _handed_level(
                    dk, dv, column, coarse_dk, coarse_dv, coarse_db, coarse_k, coarse_v, bias,
                    weights, keys, values, j, known, S, 1 << power, D, DP, E, EP, HAS_BIAS,
                    OF_BIAS,
                )  # fmt: skip
    return dk, dv, column


@triton.jit
def _of_level(
    program, q, k, v, bias, coarse_k, coarse_v, weights, entries, ends, offsets, scales,
    grad, sums, grad_k, grad_v, grad_bias, coarse_dk, coarse_dv, coarse_db,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sb, sh, scale,
    T, S, left, right, width, tiles, blocks,
    H: tl.constexpr, HK: tl.constexpr, SHARE: tl.constexpr, PH: tl.constexpr,
    BIAS_HEADS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEVEL: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    RANGES: tl.constexpr, POOLED: tl.constexpr, RUNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    OF_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of N rows of one block of keys at one level."""
    ROWS: tl.constexpr = BLOCK_K // LEVEL
    PER_BLOCK: tl.constexpr = (ROWS + N - 1) // N
    PLANS: tl.constexpr = H // HK // MEMBERS  # lists of different heads for one key head
    POWER: tl.constexpr = 0 if LEVEL == 1 else 1 if LEVEL == 2 else 2 if LEVEL == 4 else 3
    pair = program // tiles
    tile = program % tiles
    block = tile // PER_BLOCK
    b = pair // HK
    kv = pair % HK
    off = tile % PER_BLOCK * N + tl.arange(0, N)
    row = block * ROWS + off
    first_token = row * LEVEL
    known = (off < ROWS) & (first_token < S)
    last_token = tl.minimum(first_token + LEVEL, S) - 1
    count = tl.cdiv(S, 2) + tl.cdiv(S, 4) + tl.cdiv(S, 8)
    source_k = k + b.to(tl.int64) * kb + kv * kh
    source_v = v + b.to(tl.int64) * vb + kv * vh
    places_k = row.to(tl.int64) * kt
    places_v = row.to(tl.int64) * vt
    of_coarse = pair.to(tl.int64) * count
    if POOLED:
        coarse_k += of_coarse * D
        coarse_v += of_coarse * E
        coarse_dk += of_coarse * D
        coarse_dv += of_coarse * E
        if OF_BIAS:
            coarse_db += of_coarse
    if HAS_BIAS:
        bias += head_of(pair, HK, BIAS_HEADS).to(tl.int64) * S
        if POOLED:
            weights += head_of(pair, HK, BIAS_HEADS).to(tl.int64) * count
    if LEVEL > 1:
        of_plan = (plan_head(b, kv * (H // HK), kv, SHARE, PH, H, HK) * blocks + block) * 8
        some = _blocks_of_level(ends + of_plan, blocks * 8, PLANS, POWER)
        known = known & (first_token < tl.where(some > 0, S, 0))  # nothing is read for nobody
        source_k = coarse_k
        source_v = coarse_v
        row += first_pooled_row(LEVEL, S)
        places_k = row.to(tl.int64) * D
        places_v = row.to(tl.int64) * E
    keys = rows_at(source_k, places_k, known, D, DP)
    values = rows_at(source_v, places_v, known, E, EP)
    added = 0.0
    if HAS_BIAS:
        if LEVEL == 1:
            added = (tl.load(bias + row, mask=known, other=float("-inf")) * LOG2E)[:, None]
        else:
            added = tl.load(weights + row, mask=known, other=float("-inf"))[:, None]
    elif LEVEL > 1:
        added = weight_of_group(LEVEL, first_token, S)[:, None]
    q += b.to(tl.int64) * qb
    grad += b.to(tl.int64) * gb
    dk = tl.zeros([N, DP], tl.float32)
    dv = tl.zeros([N, EP], tl.float32)
    column = tl.zeros([N], tl.float32)
    WHOLE: tl.constexpr = BLOCK_Q % M == 0
    PLAIN: tl.constexpr = not HAS_BIAS and LEVEL == 1
    HALF: tl.constexpr = keys.dtype.primitive_bitwidth == 16
    SCALED: tl.constexpr = HAS_SCALES or not HALF  # tile by tile; else at the end
    worked = 0
    for member_of_plans in tl.range(0, PLANS):
        h0 = kv * (H // HK) + member_of_plans
        first = 0
        gap = 0
        of_gap = 0
        begin = 0
        list_of = entries
        cuts = entries
        if RANGES:
            first, whole, cut, last = queries_in_reach(
                block, T, S, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
            )
            clear = cut - whole
            gap = whole - first
            of_gap = clear
            stop = gap + last - cut
            begin = whole
        else:
            head = plan_head(b, h0, kv, SHARE, PH, H, HK)
            at_end = (head * blocks + block).to(tl.int64) * 8
            if RUNS:
                begin_of = tl.load(offsets + head.to(tl.int64) * (blocks + 1) + block)
                list_of = entries + head.to(tl.int64) * width + begin_of
            else:
                list_of = entries + (head * blocks + block).to(tl.int64) * width
            at = 0
            if POWER > 0:
                at = tl.load(ends + at_end + POWER - 1)
            clear = tl.load(ends + at_end + POWER) - at
            at_cut = tl.load(ends + at_end + POWER + 3)
            stop = tl.load(ends + at_end + POWER + 4) - at_cut
            cuts = list_of + at_cut
            list_of += at
        worked += clear + stop
        clear_tiles = tl.cdiv(clear * (MEMBERS * BLOCK_Q), M)
        if WHOLE:
            of_group, start = _clear_queries(
                0, clear_tiles, list_of, begin, MEMBERS, BLOCK_Q, M, RANGES
            )
        for n in tl.range(0, clear_tiles):
            if WHOLE:
                h = h0 + of_group
                x = tile_at(q + h * qh, start, qt, M, D, DP)
                g = tile_at(grad + h * gh, start, gt, M, E, EP)
                at_row = (b * H + h).to(tl.int64) * T + start
                shift_row, delta_row = _rows_from(sums, at_row, M)
                own = scale
                if HAS_SCALES:
                    own = tl.load(scales + b * sb + h * sh)
                of_group, start = _clear_queries(
                    n + 1, clear_tiles, list_of, begin, MEMBERS, BLOCK_Q, M, RANGES
                )
            else:
                member, query, there = _queries_of(
                    n, list_of, clear, begin, clear + 1, 0, T, MEMBERS, BLOCK_Q, M, RANGES
                )
                h = h0 + member
                x = rows_at(q, h.to(tl.int64) * qh + query.to(tl.int64) * qt, there, D, DP)
                g = rows_at(grad, h.to(tl.int64) * gh + query.to(tl.int64) * gt, there, E, EP)
                at_row = (b * H + h).to(tl.int64) * T + query
                shift_row, delta_row = _rows_at(sums, at_row, there, M, HALF)
                own = scale
                if HAS_SCALES:
                    own = tl.load(scales + b * sb + h * sh)[None, :]
            dk, dv, column = _add(
                dk, dv, column, keys, values, x, g, own * LOG2E, own, added, shift_row, delta_row,
                known[:, None], False, OF_BIAS, PLAIN, SCALED, PRECISION,
            )  # fmt: skip
        for n in tl.range(0, tl.cdiv(stop * (MEMBERS * BLOCK_Q), M)):
            member, query, there = _queries_of(
                n, cuts, stop, first, gap, of_gap, T, MEMBERS, BLOCK_Q, M, RANGES
            )
            h = h0 + member
            x = rows_at(q, h.to(tl.int64) * qh + query.to(tl.int64) * qt, there, D, DP)
            g = rows_at(grad, h.to(tl.int64) * gh + query.to(tl.int64) * gt, there, E, EP)
            at_row = (b * H + h).to(tl.int64) * T + query
            shift_row, delta_row = _rows_at(sums, at_row, there, M, HALF)
            own = scale
            if HAS_SCALES:
                own = tl.load(scales + b * sb + h * sh)[None, :]
            seen = there[None, :] & known[:, None] & visible(
                first_token[:, None], last_token[:, None], (query + (S - T))[None, :],
                left, right, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            dk, dv, column = _add(
                dk, dv, column, keys, values, x, g, own * LOG2E, own, added, shift_row, delta_row,
                seen, True, OF_BIAS, PLAIN, SCALED, PRECISION,
            )  # fmt: skip
    if not SCALED:
        dk *= scale
    if LEVEL == 1:
        if POOLED:
            of_plan = (plan_head(b, kv * (H // HK), kv, SHARE, PH, H, HK) * blocks + block) * 8
            of_next = blocks * 8
            dk, dv, column = _handed(
                dk, dv, column, coarse_dk, coarse_dv, coarse_db, coarse_k, coarse_v, bias,
                weights, keys, values, row, known, ends, of_plan, of_next, S,
                PLANS, D, DP, E, EP, BLOCK_K, HAS_BIAS, OF_BIAS,
            )  # fmt: skip
        base = pair.to(tl.int64) * S
        _put(grad_k, (base + row) * D, known, dk, D, DP)
        _put(grad_v, (base + row) * E, known, dv, E, EP)
        if OF_BIAS:
            tl.store(grad_bias + base + row, column, mask=known)
    elif worked > 0:
        _put(coarse_dk, row.to(tl.int64) * D, known, dk, D, DP)
        _put(coarse_dv, row.to(tl.int64) * E, known, dv, E, EP)
        if OF_BIAS:
            tl.store(coarse_db + row, column, mask=known)


@triton.jit(do_not_specialize=["T", "S", "left", "right", "width", "tiles", "blocks"])
def keys_kernel(
    q, k, v, bias, coarse_k, coarse_v, weights, entries, ends, offsets, scales,
    grad, sums, grad_k, grad_v, grad_bias, coarse_dk, coarse_dv, coarse_db,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sb, sh, scale,
    T, S, left, right, width, tiles, blocks,
    H: tl.constexpr, HK: tl.constexpr, SHARE: tl.constexpr, PH: tl.constexpr,
    BIAS_HEADS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    RANGES: tl.constexpr, POOLED: tl.constexpr, RUNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    OF_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients [B HK, S, .] of keys, values and biases.

    RUNS: lists stand where `offsets` says, not at [., blocks, width].
    """
    _of_level(
        tl.program_id(0), q, k, v, bias, coarse_k, coarse_v, weights, entries, ends, offsets,
        scales, grad, sums, grad_k, grad_v, grad_bias, coarse_dk, coarse_dv, coarse_db,
        qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sb, sh, scale,
        T, S, left, right, width, tiles, blocks, H, HK, SHARE, PH, BIAS_HEADS, MEMBERS,
        BLOCK_Q, BLOCK_K, 1, D, DP, E, EP, M, N, RANGES, POOLED, RUNS, HAS_BIAS, OF_BIAS,
        HAS_SCALES, HAS_LEFT, HAS_RIGHT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S", "left", "right", "width", "pairs", "blocks"])
def coarse_keys_kernel(
    q, k, v, bias, coarse_k, coarse_v, weights, entries, ends, scales,
    grad, sums, coarse_dk, coarse_dv, coarse_db,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sb, sh, scale,
    T, S, left, right, width, pairs, blocks,
    H: tl.constexpr, HK: tl.constexpr, SHARE: tl.constexpr, PH: tl.constexpr,
    BIAS_HEADS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, OF_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of pooled rows, in float32; WIDE: rows of a tile by level 2, 4, 8, 0 for none."""
    program = tl.program_id(0)
    for power in tl.static_range(1, 4):
        if WIDE[power - 1] > 0:
            tiles = blocks * ((BLOCK_K // (1 << power) + WIDE[power - 1] - 1) // WIDE[power - 1])
            if (program >= 0) & (program < pairs * tiles):
                _of_level(
                    program, q, k, v, bias, coarse_k, coarse_v, weights, entries, ends, None,
                    scales, grad, sums, None, None, None, coarse_dk, coarse_dv, coarse_db,
                    qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, sb, sh, scale,
                    T, S, left, right, width, tiles, blocks, H, HK, SHARE, PH, BIAS_HEADS,
                    MEMBERS, BLOCK_Q, BLOCK_K, 1 << power, D, DP, E, EP, M, WIDE[power - 1],
                    False, True, False, HAS_BIAS, OF_BIAS, HAS_SCALES, HAS_LEFT, HAS_RIGHT,
                    PRECISION,
                )  # fmt: skip
            program -= pairs * tiles


@triton.jit
def _put(target, places, there, values, D: tl.constexpr, DP: tl.constexpr):
    channels = tl.arange(0, DP)
    mask = there[:, None] & (channels < D)[None, :]
    values = values.to(target.dtype.element_ty)
    tl.store(target + places[:, None] + channels[None, :], values, mask=mask)
