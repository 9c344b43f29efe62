"""The way of a tile of queries through its list: which rows it has, and the keys of each turn.

A list names blocks of keys (`lists.py`); without a plan it is a range of blocks (RANGES).
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.block_sparse.triton.tile import (
    first_pooled_row,
    keys_in_reach,
    plan_head,
    rows_at,
    tile_at,
    visible,
    weight_of_group,
)


@triton.jit
def rows_of_queries(
    tile, i, h0, T, stride_h, stride_t,
    M: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Of the M rows of a tile of block i: head and query, whether they are there, their places."""
    f = tile * M + tl.arange(0, M)
    head = h0 + tl.minimum(f // BLOCK_Q, MEMBERS - 1)
    query = i * BLOCK_Q + f % BLOCK_Q
    there = (f < MEMBERS * BLOCK_Q) & (query < T)
    places = head.to(tl.int64) * stride_h + query.to(tl.int64) * stride_t
    return head, query, there, places


@triton.jit
def list_of_queries(
    entries, ends, b, h0, kv, i, width, queries, T, S, left, right,
    SHARE: tl.constexpr, PH: tl.constexpr, H: tl.constexpr, HK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """What block i of queries walks over at level 1, and where its list and its ends stand.

    `clear` blocks seen wholly, of a range from block `begin` on; and `stop` that are cut: entries
    `cuts`, or of a range from block `first` on, with a gap (see `level_one`).
    """
    if RANGES:
        first, begin, cut, last = keys_in_reach(
            i, T, S, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT
        )
        clear = cut - begin
        gap = begin - first
        of_gap = clear
        stop = gap + last - cut
        cuts = entries
    else:
        row = plan_head(b, h0, kv, SHARE, PH, H, HK) * queries + i
        entries += row.to(tl.int64) * width
        ends += row.to(tl.int64) * 8
        clear = tl.load(ends)
        at = tl.load(ends + 3)
        stop = tl.load(ends + 4) - at
        cuts = entries + at
        begin = i * 0
        first = begin
        gap = begin
        of_gap = begin
    return begin, clear, stop, cuts, first, gap, of_gap, entries, ends


@triton.jit
def level_one(
    n, entries, count, first, gap, of_gap,
    BLOCK_K: tl.constexpr, N: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """The keys of tile n of `count` blocks of a list, or of a range; and which are there.

    Of a range, blocks from `first` on, those from number `gap` on `of_gap` further.
    """
    steps = tl.arange(0, N)
    if RANGES:
        at = first + n
        at += tl.where(n >= gap, of_gap, 0)
        keys = at * BLOCK_K + steps
        there = steps < BLOCK_K
    elif BLOCK_K % N == 0:
        at = tl.load(entries + n // (BLOCK_K // N)) >> 4
        keys = at * BLOCK_K + n % (BLOCK_K // N) * N + steps
        there = steps < N
    else:
        row = n * N + steps
        there = row < count * BLOCK_K
        at = tl.load(entries + row // BLOCK_K, mask=there, other=0) >> 4
        keys = at * BLOCK_K + row % BLOCK_K
    return keys, there


@triton.jit
def clear_start(
    n, tiles, entries, first, BLOCK_K: tl.constexpr, N: tl.constexpr, RANGES: tl.constexpr
):  # fmt: skip
    """The first key of tile n of blocks that are seen wholly; of the last one beyond the last.

    Loops ask for it a turn before they need it: their loads of keys wait for no other load then.
    """
    if RANGES:
        start = (first + n) * BLOCK_K
    elif BLOCK_K % N == 0:
        n = tl.maximum(tl.minimum(n, tiles - 1), 0)
        at = tl.load(entries + n // (BLOCK_K // N), mask=tiles > 0, other=0) >> 4
        start = at * BLOCK_K + n % (BLOCK_K // N) * N
    else:
        start = n * 0
    return start


@triton.jit
def clear_tile(
    n, start, entries, count, k, v, kt, vt,
    BLOCK_K: tl.constexpr, N: tl.constexpr, RANGES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile of blocks that are seen wholly, which begins at key `start`."""
    if RANGES or BLOCK_K % N == 0:
        keys = start + tl.arange(0, N)
        there = tl.arange(0, N) < N
        x = tile_at(k, start, kt, N, D, DP)
        y = tile_at(v, start, vt, N, E, EP)
    else:
        keys, there = level_one(n, entries, count, 0, n, 0, BLOCK_K, N, False)
        x = rows_at(k, keys.to(tl.int64) * kt, there, D, DP)
        y = rows_at(v, keys.to(tl.int64) * vt, there, E, EP)
    return x, y, keys, there


@triton.jit
def pooled_row(n, entries, count, S, R, level, N: tl.constexpr):
    """Rows, among the pooled ones, of tile n of `count` blocks of one level, R rows each."""
    row = n * N + tl.arange(0, N)
    there = row < count * R
    at = tl.load(entries + row // R, mask=there, other=0) >> 4
    return first_pooled_row(level, S) + at * R + row % R, there


@triton.jit
def pooled_cut_row(n, entries, count, S, BLOCK_K: tl.constexpr, N: tl.constexpr):
    """The same of any level, half a block of rows each; and the level of each row."""
    HALF: tl.constexpr = BLOCK_K // 2
    row = n * N + tl.arange(0, N)
    there = row < count * HALF
    code = tl.load(entries + row // HALF, mask=there, other=2)
    level = code & 15
    R = BLOCK_K // level
    group = (code >> 4) * R + row % HALF
    there = there & (row % HALF < R) & (group * level < S)
    return first_pooled_row(level, S) + group, group * level, level, there


@triton.jit
def pooled_rows(source, pair, S, WIDTH: tl.constexpr):
    """Where the pooled rows, WIDTH numbers each, of a batch row and head of keys begin."""
    count = tl.cdiv(S, 2) + tl.cdiv(S, 4) + tl.cdiv(S, 8)
    return source + pair.to(tl.int64) * count * WIDTH


@triton.jit
def pooled_tile(
    n, entries, count, power, coarse_k, coarse_v, S,
    BLOCK_K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    """Keys and values of tile n of blocks of level 2 ** power, which rows, and which are there."""
    level = 1 << power
    rows, known = pooled_row(n, entries, count, S, BLOCK_K // level, level, N)
    keys = rows_at(coarse_k, rows.to(tl.int64) * D, known, D, DP)
    values = rows_at(coarse_v, rows.to(tl.int64) * E, known, E, EP)
    return keys, values, rows, known


@triton.jit
def pooled_weight(power, weights, rows, known, HAS_BIAS: tl.constexpr):
    """What rows of one level weigh: all the same, or with biases one number for each."""
    added = power * 1.0
    if HAS_BIAS:
        added = tl.load(weights + rows, mask=known, other=0.0)
    return added


@triton.jit
def pooled_cut_tile(
    n, entries, count, coarse_k, coarse_v, S,
    BLOCK_K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile of blocks that are cut, of any level, and what rows they are."""
    rows, token, level, known = pooled_cut_row(n, entries, count, S, BLOCK_K, N)
    keys = rows_at(coarse_k, rows.to(tl.int64) * D, known, D, DP)
    values = rows_at(coarse_v, rows.to(tl.int64) * E, known, E, EP)
    return keys, values, rows, token, level, known


@triton.jit
def pooled_cut_seen(
    rows, token, level, known, weights, position, S, left, right,
    HAS_BIAS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """What such rows weigh, and which queries see them; asked for after the products with keys."""
    last = tl.minimum(token + level, S) - 1
    seen = known[None, :] & visible(
        token[None, :], last[None, :], position, left, right, HAS_LEFT, HAS_RIGHT
    )
    if HAS_BIAS:
        added = tl.load(weights + rows, mask=known, other=0.0)
    else:
        added = weight_of_group(level, token, S)
    return added, seen
