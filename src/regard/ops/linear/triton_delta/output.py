"""Outputs of a chunk, from the state before it: what its tokens wrote, and what queries read."""

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
    keys_at,
    overflowed,
    put_rows,
    rows_at,
    square_at,
    sums_at,
    triangle,
    usable,
)


@triton.jit
def written(
    x, keys, unit, values, strength, enters, state, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """U of a chunk [C, EP] and G K S, the part of it that the state predicts, and lost tokens [C].

    A token whose numbers have overflowed is lost: 0 in U, 1 there.
    """
    found = tl.dot(keys, tl.trans(state), input_precision=PRECISION)
    predicted = kept(found, enters * unit)
    right = (values - predicted) * strength[:, None]
    u = tl.dot(x, usable(right).to(OPERAND), input_precision=PRECISION)
    lost = tl.max(overflowed(right) | overflowed(u), 1)
    return tl.where((lost > 0)[:, None], 0.0, u), predicted, lost


@triton.jit(do_not_specialize=["T", "chunks"])
def output_kernel(
    q,
    k,
    v,
    beta,
    facts,
    inverse,
    states,
    out,
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
    """out [B, H, T, E] of every query head; NaN in rows that see a lost token."""
    chunk = tl.program_id(0) % chunks
    pair = tl.program_id(0) // chunks
    b = (pair // H).to(tl.int64)
    head = pair % H
    h = (head // (H // HK)).to(tl.int64)
    n = b * HK + h
    row = n * chunks + chunk
    facts += n * (chunks * CHUNK)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    keys, unit = keys_at(
        k + b * kb + h * kh, facts, plane, tokens, kt, T, F, FP, NORMALISE, OPERAND
    )
    values = rows_at(v + b * vb + h * vh, tokens, vt, T, E, EP).to(tl.float32)
    strength = tl.load(
        beta + b * bb + h * bh + tokens.to(tl.int64) * bt, mask=tokens < T, other=0.0
    ).to(tl.float32)
    high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
    enters = entering(high, low, cuts, HAS_DECAY)
    state = tl.load(states + row * (EP * FP) + square_at(EP, FP)).to(OPERAND)
    x = triangle(inverse, row, OPERAND)
    u, _, lost = written(x, keys, unit, values, strength, enters, state, OPERAND, PRECISION)

    queries = rows_at(q + b * qb + head.to(tl.int64) * qh, tokens, qt, T, F, FP).to(OPERAND)
    t = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    inside, seen = between(
        high[:, None], low[:, None], cuts[:, None], high[None, :], low[None, :], cuts[None, :],
        j <= t, HAS_DECAY,
    )  # fmt: skip
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    scores = tl.where(seen, scores * (inside * unit[None, :]), 0.0)
    rows = kept(tl.dot(queries, tl.trans(state), input_precision=PRECISION), enters)
    rows += tl.dot(scores.to(OPERAND), u.to(OPERAND), input_precision=PRECISION)
    blind = tl.max(tl.where(seen, lost[None, :], 0), 1)
    rows = tl.where((blind > 0)[:, None], float("nan"), rows * scale)
    put_rows(out + pair.to(tl.int64) * T * E, tokens, E, T, rows, E, EP)
