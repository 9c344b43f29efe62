"""What is known of every token before any product: sums of log decays, and lengths of keys."""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import power_of_two
from regard.ops.linear.decays import FORGETS as _FORGETS
from regard.ops.linear.triton_delta.tile import (
    CHUNK,
    CUTS,
    HIGH,
    LOW,
    SHRINK,
    UNIT,
    put_rows,
    rows_at,
)

FORGETS = tl.constexpr(_FORGETS)


@triton.jit(do_not_specialize=["T", "chunks"])
def tokens_kernel(
    k,
    log_decay,
    facts,
    near,
    kb,
    kh,
    kt,
    db,
    dh,
    dt,
    T,
    chunks,
    plane,
    HK: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Fills `facts` [5, N, chunks * CHUNK]; tokens after the last neither decay nor write.

    With NORMALISE keys near 1 go to `near` [N, T, F]: exactly, as powers of two bring them there.
    """
    chunk = tl.program_id(0) % chunks
    n = tl.program_id(0) // chunks
    b = (n // HK).to(tl.int64)
    h = (n % HK).to(tl.int64)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    at = facts + n.to(tl.int64) * (chunks * CHUNK) + tokens
    if HAS_DECAY:
        place = log_decay + b * db + h * dh + tokens.to(tl.int64) * dt
        steps = tl.load(place, mask=tokens < T, other=0.0).to(tl.float64)
        forgets = steps < FORGETS
        sums = tl.cumsum(tl.where(forgets, 0.0, steps), 0)
        high = sums.to(tl.float32)
        tl.store(at + HIGH * plane, high)
        tl.store(at + LOW * plane, (sums - high.to(tl.float64)).to(tl.float32))
        tl.store(at + CUTS * plane, tl.cumsum(forgets.to(tl.int32), 0).to(tl.float32))
    if NORMALISE:
        keys = rows_at(k + b * kb + h * kh, tokens, kt, T, F, FP).to(tl.float32)
        largest = tl.max(tl.abs(keys), 1)
        # In two steps: 1 / (the smallest numbers) would be inf.
        shrink = 1.0 / power_of_two(tl.minimum(tl.maximum(largest, 1e-30), 1e37))
        keys = keys * shrink[:, None]
        put_rows(near + n.to(tl.int64) * T * F, tokens, F, T, keys, F, FP)
        size = tl.sum(keys * keys, 1)
        tl.store(at + SHRINK * plane, shrink)
        tl.store(at + UNIT * plane, tl.where(size > 0, 1.0 / tl.sqrt(size), 0.0))
