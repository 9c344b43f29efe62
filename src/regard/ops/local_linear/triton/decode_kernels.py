"""Few queries, many keys: one pass that gathers every row's covariances, a merge, a solve.

A program of `gather` walks over one part (split) of the keys that one row sees and keeps, beside
the running softmax, C = sum p k k^T and Cv = sum p k v^T on tensor cores. `merge` adds the splits
up; `solve` finds g by conjugate gradients on the D x D matrix, which it holds in registers.

Keys are centred by the first real key that the row sees. Channels are padded to powers of two
(DP, DVP) by zeros. A row of `PARTIAL` is C [DP, DP], Cv [DP, DVP], sum p k [DP], sum p v [DVP].
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import power_of_two

LIFT = tl.constexpr(4.0)
LOWEST = tl.constexpr(-1.0e30)  # a score below all others whose difference to itself is a number
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_of(row, H, T, GROUP):
    """Batch, query head and query of a row; rows that share a key head are neighbours."""
    member = row % (GROUP * T)
    pair = row // (GROUP * T)
    key_heads = H // GROUP
    batch = pair // key_heads
    head = (pair % key_heads) * GROUP + member // T
    return batch, head, member % T


@triton.jit
def reach_of(query, T, S, LEFT, RIGHT):
    """Keys [low, high) that position lets a query see."""
    position = query + S - T
    low = query * 0
    high = low + S
    if LEFT >= 0:
        low = tl.minimum(tl.maximum(position - LEFT, 0), S)
    if RIGHT >= 0:
        high = tl.minimum(tl.maximum(position + RIGHT + 1, 0), S)
    return low, high


@triton.jit
def first_real(MASK, low, high, mask_key, HAS_MASK: tl.constexpr):
    """The first key from `low` on that is real."""
    first = low
    if HAS_MASK:
        first = high
        start = low
        places = tl.arange(0, 1024)
        while (start < high) & (first == high):
            keys = start + places
            real = tl.load(MASK + keys.to(tl.int64) * mask_key, mask=keys < high, other=0)
            first = tl.min(tl.where(real != 0, keys, high), 0)
            start += 1024
    return first


@triton.jit
def centre_at(keys, first, high, S, k_token, D: tl.constexpr, DP: tl.constexpr):
    """A key, by which all are centred; 0 where the row sees none."""
    channels = tl.arange(0, DP)
    place = tl.minimum(first, S - 1).to(tl.int64) * k_token
    key = tl.load(keys + place + channels, mask=channels < D, other=0.0).to(tl.float32)
    return tl.where(first < high, key, 0.0)


@triton.jit
def origin_of(
    keys, first, high, S, k_token, D: tl.constexpr, DP: tl.constexpr, INTERCEPT: tl.constexpr,
    HALF: tl.constexpr,
):
    """What is taken off the keys, and the power of two by which they are divided then.

    The latter keeps float16 in its range, and changes no digit.
    """
    centre = centre_at(keys, first, high, S, k_token, D, DP)
    sigma = tl.sum(centre * 0.0, 0) + 1.0
    if HALF:
        sigma = power_of_two(tl.sqrt(tl.sum(centre * centre, 0)))
    if not INTERCEPT:
        centre = tl.zeros([DP], tl.float32)
    return centre, sigma


@triton.jit(do_not_specialize=["T", "S", "LEFT", "RIGHT", "CHUNK"])
def gather(
    Q, K, V, MASK, BIAS, SUMS, FIRST, SCALE, PARTIAL, STATS,
    H, T, S, GROUP, LEFT, RIGHT, CHUNK, SPLITS,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    mask_batch, mask_key, bias_batch, bias_head, bias_key, bias_share,
    decay_batch, decay_head, decay_key, decay_share, scale_batch, scale_head,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, INTERCEPT: tl.constexpr, HALF: tl.constexpr, LAZY: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, STAGES: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """One part of the keys for one row: weighted sums of keys, values, and their products."""
    program = tl.program_id(0)
    part = program % PARTS
    rows = GROUP * T
    row = (program // PARTS) % rows
    split = (program // (PARTS * rows)) % SPLITS
    row += (program // (PARTS * rows * SPLITS)) * rows
    batch, head, query = row_of(row, H, T, GROUP)
    key_head = head // GROUP
    low, high = reach_of(query, T, S, LEFT, RIGHT)
    channels = tl.arange(0, DP)
    columns = tl.arange(0, DVP)
    steps = tl.arange(0, N)
    batch = batch.to(tl.int64)

    here = SUMS
    level = 0.0
    if HAS_DECAY:
        here = SUMS + batch * decay_batch + (head // decay_share) * decay_head
        position = tl.minimum(tl.maximum(query + S - T, 0), S - 1) if CAUSAL else S - 1
        place = position.to(tl.int64) * decay_key
        level = tl.load(here + place)
        origin = batch * decay_batch + (head // decay_share) * decay_head + place
        low = tl.maximum(low, tl.load(FIRST + origin).to(tl.int32))
    mask = MASK
    if HAS_MASK:
        mask = MASK + batch * mask_batch
    bias = BIAS
    if HAS_BIAS:
        bias = BIAS + batch * bias_batch + (head // bias_share) * bias_head

    scale = tl.load(SCALE + batch * scale_batch + head * scale_head) * LOG2E
    q = tl.load(
        Q + batch * q_batch + head * q_head + query * q_token + channels, mask=channels < D,
        other=0.0,
    ).to(tl.float32)
    key_base = K + batch * k_batch + key_head.to(tl.int64) * k_head
    value_base = V + batch * v_batch + key_head.to(tl.int64) * v_head
    first = first_real(mask, low, high, mask_key, HAS_MASK)
    centre, sigma = origin_of(key_base, first, high, S, k_token, D, DP, INTERCEPT, HALF)
    q = q * (scale * sigma)
    shrink = 1.0 / sigma
    centre = centre * shrink

    # Sums over keys stay in the threads that hold the keys until the end.
    RV: tl.constexpr = min(N, max(1, RANKS // DVP))
    operand = tl.float16 if HALF else tl.float32
    top = LOWEST
    total = tl.zeros([N], tl.float32)
    # With two parts the first program of a pair has C and kbar, the second Cv and vbar.
    mean = tl.zeros([DP, 16], tl.float32)  # 16 times the same: the least width of a product
    ones = tl.full([N, 16], 1.0, operand)
    mean_value = tl.zeros([RV, DVP], tl.float32)
    covariance = tl.zeros([DP, DP], tl.float32)
    crossed = tl.zeros([DP, DVP], tl.float32)

    start = low + split * CHUNK
    stop = tl.minimum(start + CHUNK, high)
    for tile in tl.range(start, stop, N, num_stages=STAGES):
        keys = tile + steps
        seen = keys < stop
        far = tl.cast(tile, tl.int64)
        if HAS_MASK:
            real = tl.load(mask + (far + steps) * mask_key, mask=seen, other=0)
            seen = seen & (real != 0)
        k = tl.load(
            key_base + far * k_token + steps[:, None] * k_token + channels[None, :],
            mask=seen[:, None] if D == DP else seen[:, None] & (channels[None, :] < D), other=0.0,
        )
        # All sums see the keys as products do, and the mean key the weights likewise: what
        # rounding adds to C is then taken off again with the mean.
        rounded = (k.to(tl.float32) * shrink - centre[None, :]).to(operand)
        k = rounded.to(tl.float32)
        s = tl.sum(k * q[None, :], 1)
        if HAS_BIAS:
            s += tl.load(bias + (far + steps) * bias_key, mask=seen, other=0.0) * LOG2E
        if HAS_DECAY:
            past = tl.load(here + (far + steps) * decay_key, mask=seen, other=0.0)
            s += tl.where(seen, (level - past).to(tl.float32) * LOG2E, 0.0)
        s = tl.where(seen, s, float("-inf"))
        # The base of the weights; LIFT keeps small ones normal numbers in float16.
        highest = tl.maximum(top, tl.max(s, 0) - LIFT)
        if LAZY:
            if highest > top:
                down = tl.exp2(top - highest)
                total *= down
                mean_value *= down
                crossed *= down
                if PARTS == 1:
                    mean *= down
                    covariance *= down
        else:
            down = tl.exp2(top - highest)
            total *= down
            mean_value *= down
            crossed *= down
            if PARTS == 1:
                mean *= down
                covariance *= down
        top = highest
        p = tl.exp2(s - top)
        total += p
        w = (k * p[:, None]).to(operand)
        if PARTS == 1:
            mean = tl.dot(tl.trans(w), ones, mean, input_precision=PRECISION)
            covariance = tl.dot(tl.trans(w), rounded, covariance, input_precision=PRECISION)
            v = tl.load(
                value_base + far * v_token + steps[:, None] * v_token + columns[None, :],
                mask=seen[:, None] if DV == DVP else seen[:, None] & (columns[None, :] < DV),
                other=0.0,
            )
            other = v.to(operand)
            weighted = v.to(tl.float32) * p[:, None]
        else:
            shown = seen & (keys < stop * part)
            v = tl.load(
                value_base + far * v_token + steps[:, None] * v_token + columns[None, :],
                mask=shown[:, None] if DV == DVP else shown[:, None] & (columns[None, :] < DV),
                other=0.0,
            )
            exact = tl.where(part == 0, k, v.to(tl.float32))
            other = exact.to(operand)
            weighted = (exact * p[:, None]).to(operand).to(tl.float32)
        mean_value += tl.sum(tl.reshape(weighted, [N // RV, RV, DVP]), 0)
        crossed = tl.dot(tl.trans(w), other, crossed, input_precision=PRECISION)

    SIZE: tl.constexpr = DP * DP + DP * DVP + DP + DVP
    out = PARTIAL + (row.to(tl.int64) * SPLITS + split) * SIZE
    side = 1
    if PARTS == 1:
        tl.store(out + channels[:, None] * DP + channels[None, :], covariance)
        tl.store(out + DP * DP + DP * DVP + channels, tl.sum(mean, 1) * 0.0625)
    else:
        side = part
    tl.store(
        out + side * DP * DP + channels[:, None] * DVP + columns[None, :], crossed
    )
    tl.store(out + DP * DP + DP * DVP + side * DP + columns, tl.sum(mean_value, 0))
    if part == 0:
        stats = STATS + (row.to(tl.int64) * SPLITS + split) * 2
        tl.store(stats, top)
        tl.store(stats + 1, tl.sum(total, 0))


@triton.jit
def merged_stats(STATS, row, SPLITS, SP: tl.constexpr):
    """Of a row: the weight of each split, the highest score, and the sum of all weights."""
    splits = tl.arange(0, SP)
    there = splits < SPLITS
    stats = STATS + (row.to(tl.int64) * SPLITS + splits) * 2
    tops = tl.load(stats, mask=there, other=LOWEST)
    sums = tl.load(stats + 1, mask=there, other=0.0)
    top = tl.max(tops, 0)
    weights = tl.where(there, tl.exp2(tops - top), 0.0)
    return weights, top, tl.sum(weights * sums, 0)


@triton.jit(do_not_specialize=["SIZE"])
def merge(
    PARTIAL, STATS, MERGED, SPLITS, SIZE, SP: tl.constexpr, E: tl.constexpr
):
    """A piece of a row's sums, over the splits, divided by the sum of the weights."""
    row, piece = tl.program_id(0), tl.program_id(1)
    weights, _, total = merged_stats(STATS, row, SPLITS, SP)
    splits = tl.arange(0, SP)
    places = piece * E + tl.arange(0, E)
    base = PARTIAL + row.to(tl.int64) * SPLITS * SIZE
    x = tl.load(
        base + splits[:, None].to(tl.int64) * SIZE + places[None, :],
        mask=(splits[:, None] < SPLITS) & (places[None, :] < SIZE), other=0.0,
    )
    share = tl.where(total > 0, 1.0 / total, 0.0)
    tl.store(
        MERGED + row.to(tl.int64) * SIZE + places, tl.sum(x * weights[:, None], 0) * share,
        mask=places < SIZE,
    )


@triton.jit(do_not_specialize=["T", "S", "LEFT", "RIGHT", "MAX_ITERS", "TOL"])
def solve(
    Q, K, MASK, FIRST, SCALE, RIDGE, ROW_BIAS, MERGED, STATS,
    OUT, SLOPE, LSE, ITERATIONS, RESIDUAL, FAILED,
    H, T, S, GROUP, LEFT, RIGHT, SPLITS, TOL, MAX_ITERS,
    q_batch, q_head, q_token, k_batch, k_head, k_token, mask_batch, mask_key,
    decay_batch, decay_head, decay_key, decay_share,
    scale_batch, scale_head, ridge_batch, ridge_head, ridge_token,
    bias_batch, bias_head, bias_token,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, SP: tl.constexpr,
    CAUSAL: tl.constexpr, INTERCEPT: tl.constexpr, ABSOLUTE: tl.constexpr,
    HALF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
):  # fmt: skip
    """What the parts of a row came to: conjugate gradients on its D x D matrix, and the output."""
    row = tl.program_id(0)
    batch, head, query = row_of(row, H, T, GROUP)
    low, high = reach_of(query, T, S, LEFT, RIGHT)
    batch = batch.to(tl.int64)
    key_head = (head // GROUP).to(tl.int64)
    channels = tl.arange(0, DP)
    columns = tl.arange(0, DVP)
    _, top, total = merged_stats(STATS, row, SPLITS, SP)
    some = total > 0
    share = tl.where(some, 1.0 / total, 0.0)

    scale = tl.load(SCALE + batch * scale_batch + head * scale_head)
    q = tl.load(
        Q + batch * q_batch + head * q_head + query * q_token + channels, mask=channels < D,
        other=0.0,
    ).to(tl.float32)
    if HAS_DECAY:
        position = tl.minimum(tl.maximum(query + S - T, 0), S - 1) if CAUSAL else S - 1
        origin = batch * decay_batch + (head // decay_share) * decay_head
        place = position.to(tl.int64) * decay_key
        low = tl.maximum(low, tl.load(FIRST + origin + place).to(tl.int32))
    mask = MASK
    if HAS_MASK:
        mask = MASK + batch * mask_batch
    first = first_real(mask, low, high, mask_key, HAS_MASK)
    keys = K + batch * k_batch + key_head * k_head
    centre, sigma = origin_of(keys, first, high, S, k_token, D, DP, INTERCEPT, HALF)
    lse = tl.where(
        some, tl.log(total) + top / LOG2E + scale * tl.sum(q * centre, 0), float("-inf")
    )
    if HAS_ROW_BIAS:
        lse += tl.load(ROW_BIAS + batch * bias_batch + head * bias_head + query * bias_token)
    ridge = tl.load(RIDGE + batch * ridge_batch + head * ridge_head + query * ridge_token)
    if ABSOLUTE:
        ridge = ridge * tl.exp(-tl.where(some, lse, 0.0))
    ridge = ridge / (sigma * sigma)

    # With one split nothing was merged, nor divided by the sum of the weights.
    alone = tl.where(SPLITS == 1, share, 1.0)
    SIZE: tl.constexpr = DP * DP + DP * DVP + DP + DVP
    sums = MERGED + row.to(tl.int64) * SIZE
    mean = tl.load(sums + DP * DP + DP * DVP + channels) * alone
    value = tl.load(sums + DP * DP + DP * DVP + DP + columns) * alone
    matrix = tl.load(sums + channels[:, None] * DP + channels[None, :]) * alone
    if INTERCEPT:
        matrix -= mean[:, None] * mean[None, :]
    else:
        mean = tl.zeros([DP], tl.float32)
    right = tl.where(some, mean - (q - centre) / sigma, 0.0)

    x = tl.zeros([DP], tl.float32)
    r = right
    size = tl.sum(r * r, 0)
    left = size
    direction = r
    steps = 0
    while (left > TOL * TOL * size) & (steps < MAX_ITERS):
        y = tl.sum(matrix * direction[None, :], 1) + ridge * direction
        length = left / tl.sum(direction * y, 0)
        x += length * direction
        r -= length * y
        now = tl.sum(r * r, 0)
        direction = r + (now / left) * direction
        left = now
        steps += 1
    failed = left > TOL * TOL * size
    # Of the system itself, not of what the iteration believes.
    rest = right - tl.sum(matrix * x[None, :], 1) - ridge * x
    rest = tl.where(channels < D, rest, 0.0)
    residual = tl.where(size > 0, tl.sqrt(tl.sum(rest * rest, 0) / size), 0.0)

    crossed = tl.load(sums + DP * DP + channels[:, None] * DVP + columns[None, :]) * alone
    at_mean = tl.sum(x * mean, 0)
    if INTERCEPT:
        slope_part = value * at_mean - tl.sum(crossed * x[:, None], 0)
        out = value
    else:
        slope_part = 0.0 - tl.sum(crossed * x[:, None], 0)
        out = tl.zeros([DVP], tl.float32)
    # A row that could not be solved gets the local average, and says so by its residual. What
    # 16-bit inputs can tell apart is a hundred times coarser.
    NOISE: tl.constexpr = 1e-1 if HALF else 1e-3
    noise = 1.2e-7 * tl.sqrt(tl.sum(x * x, 0)) * (
        tl.sqrt(tl.sum(mean * mean, 0)) + tl.sqrt(size)
    )
    sound = (residual <= 0.5) & (noise < NOISE) & (tl.sum(tl.abs(slope_part), 0) < float("inf"))
    x = tl.where(sound, x, 0.0)
    out += tl.where(sound, slope_part, 0.0)
    residual = tl.where(sound, residual, 1.0)

    place = (batch * H + head) * T + query
    tl.store(OUT + place * DV + columns, out, mask=columns < DV)
    tl.store(SLOPE + place * D + channels, x / sigma, mask=channels < D)
    tl.store(LSE + place, lse)
    tl.store(ITERATIONS + place, steps)
    tl.store(RESIDUAL + place, residual)
    tl.store(FAILED + place, (failed | (sound == 0)).to(tl.int8))
