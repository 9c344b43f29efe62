"""A few tokens, one after the other: the delta rule itself on panels of the state."""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import power_of_two
from regard.ops.linear.triton_delta.tokens import FORGETS


@triton.jit(do_not_specialize=["T"])
def decode_kernel(
    q,
    k,
    v,
    beta,
    log_decay,
    start,
    last,
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
    db,
    dh,
    dt,
    T,
    H: tl.constexpr,
    HK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """out [B, H, T, E] and the last state [N, F, E], from `start` or nothing; all float32."""
    GROUP: tl.constexpr = H // HK
    block = tl.program_id(0) % BLOCKS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    b = n // HK
    h = n % HK
    channels = tl.arange(0, FP)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    held = channels < F
    there = held[:, None] & (columns < E)[None, :]
    at = n * (F * E) + channels[:, None] * E + columns[None, :]
    state = tl.zeros([FP, COLUMNS], tl.float32)
    if HAS_START:
        state = tl.load(start + at, mask=there, other=0.0)
    for t in range(T):
        token = tl.full([], t, tl.int64)
        key = tl.load(k + b * kb + h * kh + token * kt + channels, mask=held, other=0.0)
        key = key.to(tl.float32)
        if NORMALISE:
            largest = tl.max(tl.abs(key), 0)
            key = key * (1.0 / power_of_two(tl.minimum(tl.maximum(largest, 1e-30), 1e37)))
            size = tl.sum(key * key, 0)
            key = key * tl.where(size > 0, 1.0 / tl.sqrt(size), 0.0)
        value = tl.load(v + b * vb + h * vh + token * vt + columns, mask=columns < E, other=0.0)
        strength = tl.load(beta + b * bb + h * bh + token * bt).to(tl.float32)
        if HAS_DECAY:
            step = tl.load(log_decay + b * db + h * dh + token * dt).to(tl.float32)
            state = tl.where(step < FORGETS, 0.0, state * tl.exp(step))
        error = value.to(tl.float32) - tl.sum(key[:, None] * state, 0)
        state += key[:, None] * (strength * error)[None, :]
        for g in range(GROUP):
            head = h * GROUP + g
            query = tl.load(q + b * qb + head * qh + token * qt + channels, mask=held, other=0.0)
            read = tl.sum(query.to(tl.float32)[:, None] * state, 0) * scale
            place = out + ((b * H + head) * T + token) * E + columns
            tl.store(place, read.to(out.dtype.element_ty), mask=columns < E)
    tl.store(last + at, state, mask=there)
