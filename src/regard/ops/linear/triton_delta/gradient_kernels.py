"""The gradient of a chunk: what outputs ask of the state before it, then all gradients at once.

With W = X (beta G K) and M the masked, decayed scores of queries with keys, the outputs of a chunk
are (G Q - M W) S and something that does not depend on S, so that the state before the chunk gets
(G Q - M W)^T dO: `asked_kernel`. With the states and their gradients known, chunks are independent,
by the steps of `chunked_delta`: `readers_kernel` goes back from outputs and the state after the
chunk to what its tokens wrote, `writers_kernel` from there through the triangular system.

A product with a transposed result on its left is miscompiled for Hopper by Triton 3.4 to 3.7.0:
what is needed both ways is multiplied both ways.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton_delta.output import written
from regard.ops.linear.triton_delta.tile import (
    CHUNK,
    SHRINK,
    between,
    entering,
    kept,
    keys_at,
    put_rows,
    rows_at,
    square_at,
    sums_at,
    triangle,
    usable,
)


@triton.jit(do_not_specialize=["T", "chunks"])
def asked_kernel(
    q,
    k,
    v,
    beta,
    grad,
    facts,
    inverse,
    asked,
    scale,
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
    gb,
    gh,
    gt,
    T,
    chunks,
    plane,
    H: tl.constexpr,
    HK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """asked [N, chunks, EP, FP]: the gradient of the state before a chunk through its outputs."""
    chunk = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    b = n // HK
    h = n % HK
    row = n * chunks + chunk
    facts += n * (chunks * CHUNK)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    keys, unit = keys_at(
        k + b * kb + h * kh, facts, plane, tokens, kt, T, F, FP, NORMALISE, OPERAND
    )
    strength = tl.load(
        beta + b * bb + h * bh + tokens.to(tl.int64) * bt, mask=tokens < T, other=0.0
    ).to(tl.float32)
    high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
    enters = entering(high, low, cuts, HAS_DECAY)
    x = triangle(inverse, row, OPERAND)
    factor = strength * unit * enters
    w = tl.dot(x, (keys.to(tl.float32) * factor[:, None]).to(OPERAND), input_precision=PRECISION)
    w = usable(w).to(OPERAND)
    t = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    inside, seen = between(
        high[:, None], low[:, None], cuts[:, None], high[None, :], low[None, :], cuts[None, :],
        j <= t, HAS_DECAY,
    )  # fmt: skip
    total = tl.zeros([EP, FP], tl.float32)
    for g in range(H // HK):
        head = h * (H // HK) + g
        queries = rows_at(q + b * qb + head * qh, tokens, qt, T, F, FP).to(OPERAND)
        d_out = rows_at(grad + b * gb + head * gh, tokens, gt, T, E, EP).to(OPERAND)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(seen, scores * (inside * unit[None, :]), 0.0)
        reads = queries.to(tl.float32) * enters[:, None]
        reads -= tl.dot(scores.to(OPERAND), w, input_precision=PRECISION)
        reads = usable(reads * scale)
        total += tl.dot(tl.trans(d_out), reads.to(OPERAND), input_precision=PRECISION)
    tl.store(asked + row * (EP * FP) + square_at(EP, FP), total)


@triton.jit
def _tokens_of(
    k,
    beta,
    facts,
    plane,
    tokens,
    kt,
    bt,
    T,
    F: tl.constexpr,
    FP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Keys of a chunk and their factor, strengths, and sums of decays."""
    keys, unit = keys_at(k, facts, plane, tokens, kt, T, F, FP, NORMALISE, OPERAND)
    strength = tl.load(beta + tokens.to(tl.int64) * bt, mask=tokens < T, other=0.0)
    high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
    return keys, unit, strength.to(tl.float32), high, low, cuts


@triton.jit
def _pairs_of(high, low, cuts, HAS_DECAY: tl.constexpr, LATER_IN_ROWS: tl.constexpr):
    """Decays and what is seen between the tokens of a chunk, the later ones in rows or columns."""
    rows = tl.arange(0, CHUNK)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    if LATER_IN_ROWS:
        inside, seen = between(
            high[:, None], low[:, None], cuts[:, None],
            high[None, :], low[None, :], cuts[None, :], columns <= rows, HAS_DECAY,
        )  # fmt: skip
    else:
        inside, seen = between(
            high[None, :], low[None, :], cuts[None, :],
            high[:, None], low[:, None], cuts[:, None], rows <= columns, HAS_DECAY,
        )  # fmt: skip
    return inside, seen


@triton.jit
def _steps(crossing, left, entered):
    """The gradient of each step of a chunk from the parts of <o, do> and <S, dS> that it decays.

    crossing [j, t] from token j to token t, left [j] from j to the end, entered [t] from before
    the chunk. Step l decays what goes from a token before l to one at l or after.
    """
    rows = tl.arange(0, CHUNK)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    crossing = tl.cumsum(crossing, 1, reverse=True) + left[:, None]
    return tl.sum(tl.where(rows < columns, crossing, entered[:, None]), 0)


@triton.jit(do_not_specialize=["T", "chunks"])
def readers_kernel(
    q,
    k,
    v,
    beta,
    grad,
    facts,
    inverse,
    states,
    futures,
    dq,
    writes_out,
    d_writes,
    d_keys_out,
    steps_out,
    scale,
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
    gb,
    gh,
    gt,
    T,
    chunks,
    plane,
    H: tl.constexpr,
    HK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    READS: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    WANTS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq [B, H, T, F], what tokens write and its gradient [N, chunks, C, EP], and parts of others.

    states and futures [N, chunks, EP, FP]: S^T before a chunk, and the gradient of it after.
    d_keys_out [N, chunks, C, FP] and steps_out [N, chunks, C]: what keys and decays get from here.
    """
    chunk = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    b = n // HK
    h = n % HK
    row = n * chunks + chunk
    facts += n * (chunks * CHUNK)
    own = tl.arange(0, CHUNK)
    tokens = chunk * CHUNK + own
    keys, unit, strength, high, low, cuts = _tokens_of(
        k + b * kb + h * kh, beta + b * bb + h * bh, facts, plane, tokens, kt, bt, T, F, FP,
        HAS_DECAY, NORMALISE, OPERAND,
    )  # fmt: skip
    values = rows_at(v + b * vb + h * vh, tokens, vt, T, E, EP).to(tl.float32)
    enters = entering(high, low, cuts, HAS_DECAY)
    state = tl.load(states + row * (EP * FP) + square_at(EP, FP)).to(OPERAND)
    x = triangle(inverse, row, OPERAND)
    u, _, _ = written(x, keys, unit, values, strength, enters, state, OPERAND, PRECISION)
    writes = u.to(OPERAND)
    tl.store(writes_out + row * (CHUNK * EP) + square_at(CHUNK, EP), writes)

    # From the state after the chunk.
    leaves = enters * 0.0 + 1.0
    whole = 1.0
    if HAS_DECAY:
        end = chunk * CHUNK + CHUNK - 1 + tl.arange(0, 1)
        high_end, low_end, cuts_end = sums_at(facts, plane, end, HAS_DECAY)
        leaves, _ = between(
            high_end, low_end, cuts_end, high, low, cuts, tokens == tokens, HAS_DECAY
        )
        whole = tl.sum(entering(high_end, low_end, cuts_end, HAS_DECAY), 0)
    future = tl.load(futures + row * (EP * FP) + square_at(EP, FP)).to(OPERAND)
    d_u = kept(tl.dot(keys, tl.trans(future), input_precision=PRECISION), leaves * unit)
    d_keys = kept(tl.dot(writes, future, input_precision=PRECISION), leaves)
    if WANTS_DECAY:
        left = tl.sum(keys.to(tl.float32) * d_keys, 1) * unit
        through = tl.sum(state.to(tl.float32) * future.to(tl.float32))
        through = tl.where(whole == 0.0, 0.0, through * whole)
        crossing = tl.zeros([CHUNK, CHUNK], tl.float32)
        entered = tl.zeros([CHUNK], tl.float32)

    # From the outputs.
    if READS:
        inside, seen = _pairs_of(high, low, cuts, HAS_DECAY, True)
        inside_t, seen_t = _pairs_of(high, low, cuts, HAS_DECAY, False)
        for g in range(H // HK):
            head = h * (H // HK) + g
            queries = rows_at(q + b * qb + head * qh, tokens, qt, T, F, FP).to(OPERAND)
            d_out = rows_at(grad + b * gb + head * gh, tokens, gt, T, E, EP).to(OPERAND)
            scores_t = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            scores_t = tl.where(seen_t, scores_t * (inside_t * unit[:, None]), 0.0) * scale
            d_u += tl.dot(scores_t.to(OPERAND), d_out, input_precision=PRECISION)
            d_scores_t = tl.dot(writes, tl.trans(d_out), input_precision=PRECISION)
            d_scores_t = tl.where(seen_t, d_scores_t, 0.0)
            if WANTS_DECAY:
                crossing += scores_t * d_scores_t
            d_scores_t = d_scores_t * (inside_t * scale)
            d_keys += tl.dot(d_scores_t.to(OPERAND), queries, input_precision=PRECISION)
            d_queries = kept(tl.dot(d_out, state, input_precision=PRECISION), enters) * scale
            if WANTS_DECAY:
                entered += tl.sum(queries.to(tl.float32) * d_queries, 1)
            d_scores = tl.dot(d_out, tl.trans(writes), input_precision=PRECISION)
            d_scores = tl.where(seen, d_scores * (inside * unit[None, :]), 0.0) * scale
            d_queries += tl.dot(d_scores.to(OPERAND), keys, input_precision=PRECISION)
            put_rows(dq + (b * H + head) * T * F, tokens, F, T, d_queries, F, FP)
    if WANTS_DECAY:
        steps = _steps(crossing, left, entered) + through
        tl.store(steps_out + row * CHUNK + own, steps)
    tl.store(d_keys_out + row * (CHUNK * FP) + square_at(CHUNK, FP), d_keys)
    d_u = usable(d_u).to(OPERAND)
    tl.store(d_writes + row * (CHUNK * EP) + square_at(CHUNK, EP), d_u)


@triton.jit(do_not_specialize=["T", "chunks"])
def writers_kernel(
    k,
    v,
    beta,
    facts,
    inverse,
    states,
    writes_in,
    d_writes,
    d_keys_in,
    steps_in,
    dk,
    dv,
    d_beta,
    d_decay,
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
    HK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    WANTS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of k, v, beta and log_decay, contiguous, from what `readers_kernel` left."""
    chunk = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    b = n // HK
    h = n % HK
    row = n * chunks + chunk
    facts += n * (chunks * CHUNK)
    own = tl.arange(0, CHUNK)
    tokens = chunk * CHUNK + own
    keys, unit, strength, high, low, cuts = _tokens_of(
        k + b * kb + h * kh, beta + b * bb + h * bh, facts, plane, tokens, kt, bt, T, F, FP,
        HAS_DECAY, NORMALISE, OPERAND,
    )  # fmt: skip
    enters = entering(high, low, cuts, HAS_DECAY)
    state = tl.load(states + row * (EP * FP) + square_at(EP, FP)).to(OPERAND)
    x = triangle(inverse, row, OPERAND)
    d_u = tl.load(d_writes + row * (CHUNK * EP) + square_at(CHUNK, EP))
    d_right = tl.dot(tl.trans(x), d_u, input_precision=PRECISION)
    d_values = d_right * strength[:, None]
    put_rows(dv + n * T * E, tokens, E, T, d_values, E, EP)
    values = rows_at(v + b * vb + h * vh, tokens, vt, T, E, EP).to(tl.float32)
    predicted = tl.dot(keys, tl.trans(state), input_precision=PRECISION)
    predicted = usable(kept(predicted, enters * unit))
    error = tl.sum(d_right * (values - predicted), 1)
    if WANTS_DECAY:
        entered = -tl.sum(d_values * predicted, 1)
    d_keys = tl.load(d_keys_in + row * (CHUNK * FP) + square_at(CHUNK, FP))
    d_keys -= kept(tl.dot(d_values.to(OPERAND), state, input_precision=PRECISION), enters)

    rows = tl.arange(0, CHUNK)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    rounded = d_right.to(OPERAND)
    writes = tl.load(writes_in + row * (CHUNK * EP) + square_at(CHUNK, EP))
    inside_t, seen_t = _pairs_of(high, low, cuts, HAS_DECAY, False)
    seen_t = seen_t & (rows < columns)
    pairs_t = tl.dot(writes, tl.trans(rounded), input_precision=PRECISION)
    pairs_t = tl.where(seen_t, pairs_t, 0.0)
    overlaps = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    overlaps = usable(overlaps * (inside_t * (unit[:, None] * unit[None, :])))
    weighed = pairs_t * tl.where(seen_t, overlaps, 0.0)
    error -= tl.sum(weighed, 0)
    tl.store(d_beta + n * T + tokens, error.to(d_beta.dtype.element_ty), mask=tokens < T)
    if WANTS_DECAY:
        steps = _steps(-weighed * strength[None, :], entered * 0.0, entered)
        steps += tl.load(steps_in + row * CHUNK + own)
        tl.store(d_decay + n * T + tokens, steps, mask=tokens < T)
    inside, seen = _pairs_of(high, low, cuts, HAS_DECAY, True)
    pairs = tl.dot(rounded, tl.trans(writes), input_precision=PRECISION)
    pairs = tl.where(seen & (columns < rows), pairs * (inside * strength[:, None]), 0.0)
    pairs += pairs_t * (inside_t * strength[None, :])
    both = (pairs * unit[None, :]).to(OPERAND)
    d_keys -= tl.dot(both, keys, input_precision=PRECISION)
    if NORMALISE:
        direction = keys.to(tl.float32) * unit[:, None]
        d_keys -= direction * tl.sum(direction * d_keys, 1)[:, None]
        shrink = tl.load(facts + SHRINK * plane + tokens)
        d_keys = d_keys * unit[:, None] * shrink[:, None]
    put_rows(dk + n * T * F, tokens, F, T, d_keys, F, FP)
