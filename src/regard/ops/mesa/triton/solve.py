"""Conjugate gradients on the ridge systems of a chunk, and what their solutions read.

    (Hkk_t + R) x_t = q_t,   Hkk_t p = G_t Hkk p + sum_{j <= t, in chunk} w_tj beta_j (k_j . p) k_j

with Hkk the sum before the chunk and G, w decays. A tile of 64 queries makes one step together
and stops when all its rows have; x, r and the direction stay in registers. The direction of a
row has norm 1 and is rounded, and the rounded direction is the direction everywhere:

    y = (Hkk_t + R) p;   a = (r . p) / (p . y);   x += a p;   r -= a y
    p <- r - ((r . y) / (p . y)) p

so that its rounding costs nothing. When a row has stopped, x += (its smallest step) r halves its
error for no product: steps are at least 1 / (largest eigenvalue).
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton_delta.tile import (
    CHUNK,
    between,
    entering,
    kept,
    put_rows,
    rows_at,
    square_at,
    sums_at,
)

EARLY = tl.constexpr(16)  # channels for every step in which scores are two terms
TAME = tl.constexpr(1e36)  # of the numbers of a key: its products with unit vectors are finite


@triton.jit
def _weighed(product, weights, CAREFUL: tl.constexpr):
    """Products times weights; CAREFUL: exactly 0 where the weight is, whatever the product."""
    if CAREFUL:
        product = tl.where(weights == 0.0, 0.0, product * weights)
    else:
        product *= weights
    return product


@triton.jit
def _read(
    rows, keys, values, weights, enters, past, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """The sums of a chunk's rows applied to `rows`, against values."""
    found = kept(tl.dot(rows, past, input_precision=PRECISION), enters)
    scores = tl.dot(rows, tl.trans(keys), input_precision=PRECISION)
    scores = _weighed(scores, weights, True)
    return tl.dot(scores.to(OPERAND), values, found, input_precision=PRECISION)


@triton.jit
def _steps(
    x, r, p, active, length, smallest, size, goal, steps, count, keys, weights, enters, shift,
    past, keys_rest, row, limit,
    DP: tl.constexpr, HAS_DECAY: tl.constexpr, SPLIT: tl.constexpr, TERMS: tl.constexpr,
    CAREFUL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps until all rows have stopped or the limit is reached; `count` have been made.

    CAREFUL: 0 is 0 times anything. TERMS: those that scores enter products as.
    """
    going = tl.max(active.to(tl.int32), 0)
    while (going > 0) & (count < limit):
        # Every product in a region of its own, though all conditions hold: where one product
        # feeds another in the same region, Triton gives each warp whole rows, and of eight warps
        # four would repeat what the others compute.
        y = tl.zeros([CHUNK, DP], tl.float32)
        if count >= 0:
            y = tl.dot(p, past, input_precision=PRECISION)
        if SPLIT:  # noqa: SIM102
            if limit > 0:
                rest = tl.load(keys_rest + row * (DP * DP) + square_at(DP, DP))
                y = tl.dot(p, rest, y, input_precision=PRECISION)
        if CAREFUL:
            y = kept(y, enters)
        elif HAS_DECAY:
            y *= enters[:, None]
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        if going > 0:
            scores = tl.dot(p, tl.trans(keys), input_precision=PRECISION)
            scores = _weighed(scores, weights, CAREFUL)
        short = scores.to(OPERAND)
        if count < limit:
            y = tl.dot(short, keys, y, input_precision=PRECISION)
        if TERMS == 2:  # noqa: SIM102
            if count < limit:
                left = (scores - short.to(tl.float32)).to(OPERAND)
                y = tl.dot(left, keys, y, input_precision=PRECISION)
        d = p.to(tl.float32)
        y += d * shift
        curvature = tl.sum(d * y, 1)
        # Rows that are done have d = 0 and y = 0. One whose y is no number spoils its own r, which
        # is not looked at again before the loop has ended.
        active = active & (curvature > 0) & (curvature < float("inf"))
        over = tl.where(active, 1.0 / curvature, 0.0)
        a = tl.where(active, tl.sum(r * d, 1) * over, 0.0)
        x += a[:, None] * d
        r -= a[:, None] * y
        smallest = tl.where(active, tl.minimum(smallest, a / length), smallest)
        steps += active.to(tl.int32)
        size = tl.where(active, tl.sum(r * r, 1), size)
        active = active & (size > goal) & (size < float("inf"))
        turn = tl.where(active, tl.sum(r * y, 1) * over, 0.0)
        # r is now orthogonal to d, whose norm is 1 but for rounding: no sum for that of p.
        length = tl.where(active, tl.sqrt(size + turn * turn), length)
        following = (r - turn[:, None] * d) * (1.0 / length)[:, None]
        p = tl.where(active[:, None], following.to(OPERAND), 0.0)
        going = tl.max(active.to(tl.int32), 0)
        count += 1
    return x, r, p, active, length, smallest, size, steps, count


@triton.jit(do_not_specialize=["T", "chunks", "limit", "tol"])
def solve_kernel(
    q,
    k,
    v,
    beta,
    facts,
    keys_sum,
    keys_rest,
    values_sum,
    ridge,
    x_out,
    out,
    steps_out,
    tol,
    limit,
    qb,
    qh,
    qt,
    kb,
    kh,
    kt,
    vb,
    vh,
    vt,
    bb,
    bh,
    bt,
    T,
    chunks,
    plane,
    H: tl.constexpr,
    HK: tl.constexpr,
    RIDGES: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    READS: tl.constexpr,
    SHORTCUT: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x [B, H, T, D] float32; out [B, H, T, E] with READS; steps of each tile [B, H, chunks].

    ridge [B, RIDGES, D], RIDGES 1, HK or H. With tol = 0 every row makes `limit` steps. SHORTCUT:
    chunks in which nothing can overflow have steps of their own.
    """
    chunk = tl.program_id(0) % chunks
    pair = tl.program_id(0) // chunks
    b = (pair // H).to(tl.int64)
    head = pair % H
    h = (head // (H // HK)).to(tl.int64)
    n = b * HK + h
    row = n * chunks + chunk
    facts += n * (chunks * CHUNK)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = rows_at(k + b * kb + h * kh, tokens, kt, T, D, DP).to(OPERAND)
    weight = tl.load(
        beta + b * bb + h * bh + tokens.to(tl.int64) * bt, mask=tokens < T, other=0.0
    ).to(tl.float32)
    high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
    enters = entering(high, low, cuts, HAS_DECAY)
    t = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    weights, _ = between(
        high[:, None], low[:, None], cuts[:, None], high[None, :], low[None, :], cuts[None, :],
        j <= t, HAS_DECAY,
    )  # fmt: skip
    weights = weights * weight[None, :]
    past = tl.load(keys_sum + row * (DP * DP) + square_at(DP, DP))
    channels = tl.arange(0, DP)
    shift = ridge + (b * RIDGES + head * RIDGES // H) * D + channels
    shift = tl.load(shift, mask=channels < D, other=1.0)[None, :]

    r = rows_at(q + b * qb + head.to(tl.int64) * qh, tokens, qt, T, D, DP).to(tl.float32)
    x = tl.zeros([CHUNK, DP], tl.float32)
    whole = tl.sum(r * r, 1)
    size = whole
    goal = whole * (tol * tol)
    active = (size > goal) & (size < float("inf"))
    length = tl.sqrt(size)
    smallest = tl.full([CHUNK], float("inf"), tl.float32)
    p = (r * tl.where(active, 1.0 / length, 0.0)[:, None]).to(OPERAND)
    steps = tl.zeros([CHUNK], tl.int32)
    # Nothing is 0 times what may be no number: neither products with keys, nor what came before.
    tame = tl.min(enters, 0) > 0.0
    if SHORTCUT:
        tame = tame & (tl.max(tl.max(tl.abs(keys.to(tl.float32)), 1), 0) < TAME)
    count = 0
    # In the steps that move x most, what rounding leaves of scores counts: the inverse multiplies
    # it.
    if SPLIT:
        x, r, p, active, length, smallest, size, steps, count = _steps(
            x, r, p, active, length, smallest, size, goal, steps, count, keys, weights, enters,
            shift, past, keys_rest, row, tl.minimum(limit, DP // EARLY),
            DP, HAS_DECAY, SPLIT, 2, True, OPERAND, PRECISION,
        )  # fmt: skip
    if SHORTCUT and tame:
        x, r, p, active, length, smallest, size, steps, count = _steps(
            x, r, p, active, length, smallest, size, goal, steps, count, keys, weights, enters,
            shift, past, keys_rest, row, limit,
            DP, HAS_DECAY, SPLIT, 1, False, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        x, r, p, active, length, smallest, size, steps, count = _steps(
            x, r, p, active, length, smallest, size, goal, steps, count, keys, weights, enters,
            shift, past, keys_rest, row, limit,
            DP, HAS_DECAY, SPLIT, 1, True, OPERAND, PRECISION,
        )  # fmt: skip

    # A step that was taken is at most 1 / (smallest ridge); a wild one is not taken again.
    r = tl.where((tl.sum(r * 0.0, 1) == 0.0)[:, None], r, 0.0)
    free = (smallest > 0) & (smallest < float("inf")) & (tol > 0)
    x += tl.where(free, smallest, 0.0)[:, None] * tl.where(free[:, None], r, 0.0)
    lost = ((steps >= D) & (size > whole)) | (tl.sum(x * 0.0, 1) != 0.0)
    x = tl.where(lost[:, None] | (whole == 0.0)[:, None], 0.0, x)
    pair = pair.to(tl.int64)
    put_rows(x_out + pair * T * D, tokens, D, T, x, D, DP)
    tl.store(steps_out + pair * chunks + chunk, count)
    if READS:
        values = rows_at(v + b * vb + h * vh, tokens, vt, T, E, EP).to(OPERAND)
        past = tl.load(values_sum + row * (DP * EP) + square_at(DP, EP))
        first = x.to(OPERAND)
        rows = _read(first, keys, values, weights, enters, past, OPERAND, PRECISION)
        if SPLIT:  # x may be long where its products with keys cancel
            second = (x - first.to(tl.float32)).to(OPERAND)
            rows += _read(second, keys, values, weights, enters, past, OPERAND, PRECISION)
        rows = tl.where(lost[:, None], 0.0, rows)
        put_rows(out + pair * T * E, tokens, E, T, rows, E, EP)
