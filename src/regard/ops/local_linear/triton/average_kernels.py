"""Few queries, many keys, nothing to solve: averages (softmax) and given slopes (Parallax).

One program walks over a part (split) of the keys for all rows that share a key head, in tiles of
M rows; `finish` adds the splits up. A row of `PARTIAL` is sum p v [DVP] and, with a given g,
sum p t v [DVP], where t = g . (k - centre); `STATS` has the highest score, sum p and sum p t.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.local_linear.triton.decode_kernels import (
    LOG2E,
    LOWEST,
    centre_at,
    first_real,
    reach_of,
)


@triton.jit(do_not_specialize=["T", "S", "LEFT", "RIGHT", "CHUNK"])
def gather_average(
    Q, K, V, G, MASK, BIAS, SUMS, FIRST, SCALE, PARTIAL, STATS,
    H, T, S, GROUP, LEFT, RIGHT, CHUNK, SPLITS, TILES,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    g_batch, g_head, g_token,
    mask_batch, mask_key, bias_batch, bias_head, bias_key, bias_share,
    decay_batch, decay_head, decay_key, decay_share, scale_batch, scale_head,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, GIVEN: tl.constexpr,
    SPLIT_G: tl.constexpr, PRECISION: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of the keys for a tile of rows: weighted sums of v, and of (g . k) v."""
    program = tl.program_id(0)
    tile_of_rows = program % TILES
    split = (program // TILES) % SPLITS
    pair = program // (TILES * SPLITS)
    key_heads = H // GROUP
    batch = (pair // key_heads).to(tl.int64)
    key_head = pair % key_heads
    members = tile_of_rows * M + tl.arange(0, M)
    there = members < GROUP * T
    heads = key_head * GROUP + tl.minimum(members // T, GROUP - 1)
    queries = members % T
    channels = tl.arange(0, DP)
    columns = tl.arange(0, DVP)
    steps = tl.arange(0, N)

    low, high = reach_of(queries, T, S, LEFT, RIGHT)
    high = tl.where(there, high, 0)
    level = tl.zeros([M], tl.float64)
    if HAS_DECAY:
        positions = tl.minimum(tl.maximum(queries + S - T, 0), S - 1) if CAUSAL else S - 1
        home = batch * decay_batch + (heads // decay_share) * decay_head
        level = tl.load(SUMS + home + positions.to(tl.int64) * decay_key)
        begun = tl.load(FIRST + home + positions.to(tl.int64) * decay_key)
        low = tl.maximum(low, begun.to(tl.int32))
    # Of the first and the last query: what no row of the head sees is not read.
    lowest, _ = reach_of(T * 0, T, S, LEFT, RIGHT)
    _, highest_key = reach_of(T - 1, T, S, LEFT, RIGHT)
    mask = MASK
    if HAS_MASK:
        mask = MASK + batch * mask_batch

    inside = there[:, None] & (channels[None, :] < D)
    scale = tl.load(SCALE + batch * scale_batch + heads * scale_head) * LOG2E
    q = tl.load(
        Q + batch * q_batch + (heads * q_head + queries * q_token)[:, None] + channels[None, :],
        mask=inside, other=0.0,
    )
    key_base = K + batch * k_batch + key_head.to(tl.int64) * k_head
    value_base = V + batch * v_batch + key_head.to(tl.int64) * v_head
    g = q
    rest = q
    at_centre = tl.zeros([M], tl.float32)
    if GIVEN:
        exact = tl.load(
            G + batch * g_batch + (heads * g_head + queries * g_token)[:, None]
            + channels[None, :], mask=inside, other=0.0,
        ).to(tl.float32)
        g = exact.to(q.dtype)
        rest = (exact - g.to(tl.float32)).to(q.dtype)
        first = first_real(mask, lowest, highest_key, mask_key, HAS_MASK)
        centre = centre_at(key_base, first, highest_key, S, k_token, D, DP)
        at_centre = tl.sum(exact * centre[None, :], 1)

    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    tilt = tl.zeros([M], tl.float32)
    average = tl.zeros([M, DVP], tl.float32)
    tilted = tl.zeros([M, DVP], tl.float32)
    start = lowest + split * CHUNK
    stop = tl.minimum(start + CHUNK, highest_key)
    for tile in tl.range(start, stop, N, num_stages=STAGES):
        keys = tile + steps
        real = keys < stop
        far = tl.cast(tile, tl.int64)
        if HAS_MASK:
            marked = tl.load(mask + (far + steps) * mask_key, mask=real, other=0)
            real = real & (marked != 0)
        k = tl.load(
            key_base + far * k_token + steps[:, None] * k_token + channels[None, :],
            mask=real[:, None] if D == DP else real[:, None] & (channels[None, :] < D), other=0.0,
        )
        v = tl.load(
            value_base + far * v_token + steps[:, None] * v_token + columns[None, :],
            mask=real[:, None] if DV == DVP else real[:, None] & (columns[None, :] < DV),
            other=0.0,
        )
        seen = real[None, :] & (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None]
        if HAS_BIAS:
            lean = BIAS + batch * bias_batch + (heads // bias_share)[:, None] * bias_head
            s += tl.load(lean + (far + steps)[None, :] * bias_key, mask=seen, other=0.0) * LOG2E
        if HAS_DECAY:
            here = SUMS + batch * decay_batch + (heads // decay_share)[:, None] * decay_head
            past = tl.load(here + (far + steps)[None, :] * decay_key, mask=seen, other=0.0)
            s += tl.where(seen, (level[:, None] - past).to(tl.float32) * LOG2E, 0.0)
        s = tl.where(seen, s, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        down = tl.exp2(top - highest)
        top = highest
        p = tl.exp2(s - top[:, None])
        total = total * down + tl.sum(p, 1)
        average = average * down[:, None]
        average = tl.dot(p.to(v.dtype), v, average, input_precision=PRECISION)
        if GIVEN:
            t = tl.dot(g, tl.trans(k), input_precision=PRECISION)
            if SPLIT_G:
                t = tl.dot(rest, tl.trans(k), t, input_precision=PRECISION)
            # A product with a key that is not seen may be infinite.
            t = tl.where(seen, (t - at_centre[:, None]) * p, 0.0)
            t = t.to(v.dtype)  # summed as the product sees it: weights sum to 1 in few keys, too
            tilt = tilt * down + tl.sum(t.to(tl.float32), 1)
            tilted = tilted * down[:, None]
            tilted = tl.dot(t, v, tilted, input_precision=PRECISION)

    rows = pair.to(tl.int64) * (GROUP * T) + members
    stats = STATS + (rows * SPLITS + split) * 3
    tl.store(stats, top, mask=there)
    tl.store(stats + 1, total, mask=there)
    WIDTH: tl.constexpr = DVP * (2 if GIVEN else 1)
    out = PARTIAL + (rows * SPLITS + split)[:, None] * WIDTH + columns[None, :]
    tl.store(out, average, mask=there[:, None])
    if GIVEN:
        tl.store(stats + 2, tilt, mask=there)
        tl.store(out + DVP, tilted, mask=there[:, None])


@triton.jit(do_not_specialize=["T"])
def finish(
    PARTIAL, STATS, ROW_BIAS, OUT, LSE, H, T, GROUP, SPLITS, bias_batch, bias_head, bias_token,
    DV: tl.constexpr, DVP: tl.constexpr, SP: tl.constexpr, GIVEN: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
):
    """The output of a row from its splits, and its log-sum-exp."""
    row = tl.program_id(0)
    pair, member = row // (GROUP * T), row % (GROUP * T)
    key_heads = H // GROUP
    batch = (pair // key_heads).to(tl.int64)
    head = (pair % key_heads) * GROUP + member // T
    query = member % T
    columns = tl.arange(0, DVP)
    splits = tl.arange(0, SP)
    there = splits < SPLITS
    stats = STATS + (row.to(tl.int64) * SPLITS + splits) * 3
    tops = tl.load(stats, mask=there, other=LOWEST)
    top = tl.max(tops, 0)
    weights = tl.where(there, tl.exp2(tops - top), 0.0)
    total = tl.sum(weights * tl.load(stats + 1, mask=there, other=0.0), 0)
    share = tl.where(total > 0, 1.0 / total, 0.0)
    WIDTH: tl.constexpr = DVP * (2 if GIVEN else 1)
    parts = PARTIAL + (row.to(tl.int64) * SPLITS + splits)[:, None] * WIDTH + columns[None, :]
    x = tl.load(parts, mask=there[:, None], other=0.0)
    out = tl.sum(x * weights[:, None], 0) * share
    if GIVEN:
        tilts = tl.load(stats + 2, mask=there, other=0.0)
        tilt = tl.sum(weights * tilts, 0) * share
        x = tl.load(parts + DVP, mask=there[:, None], other=0.0)
        out = out * (1.0 + tilt) - tl.sum(x * weights[:, None], 0) * share
    lse = tl.where(total > 0, tl.log(total) + top / LOG2E, float("-inf"))
    if HAS_ROW_BIAS:
        lse += tl.load(ROW_BIAS + batch * bias_batch + head * bias_head + query * bias_token)
    place = (batch * H + head) * T + query
    tl.store(OUT + place * DV + columns, out, mask=columns < DV)
    tl.store(LSE + place, lse)
