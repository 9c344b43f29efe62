"""The two sums of Mesa, Hkk and Hkv, before every chunk: decayed sums of beta k [k | v]^T.

What a chunk adds is a product; from chunk to chunk the sums only decay, number by number.
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
    rows_at,
    square_at,
    sums_at,
)


@triton.jit(do_not_specialize=["T", "chunks"])
def gain_kernel(
    k,
    v,
    beta,
    facts,
    gain_k,
    gain_v,
    whole,
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
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each chunk adds, [N, chunks, DP, DP | EP] in float32, and its decay [N, chunks]."""
    chunk = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    b = n // HK
    h = n % HK
    row = n * chunks + chunk
    facts += n * (chunks * CHUNK)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = rows_at(k + b * kb + h * kh, tokens, kt, T, D, DP)
    weight = tl.load(
        beta + b * bb + h * bh + tokens.to(tl.int64) * bt, mask=tokens < T, other=0.0
    ).to(tl.float32)
    if HAS_DECAY:
        high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
        end = chunk * CHUNK + CHUNK - 1 + tl.arange(0, 1)
        high_end, low_end, cuts_end = sums_at(facts, plane, end, HAS_DECAY)
        after, _ = between(
            high_end, low_end, cuts_end, high, low, cuts, tokens == tokens, HAS_DECAY
        )
        weight = weight * after
        tl.store(whole + row + tl.arange(0, 1), entering(high_end, low_end, cuts_end, HAS_DECAY))
    left = tl.trans(kept(keys.to(tl.float32), weight).to(OPERAND))
    new = tl.dot(left, keys.to(OPERAND), input_precision=PRECISION)
    tl.store(gain_k + row * (DP * DP) + square_at(DP, DP), new)
    if VALUES:
        values = rows_at(v + b * vb + h * vh, tokens, vt, T, E, EP).to(OPERAND)
        new = tl.dot(left, values, input_precision=PRECISION)
        tl.store(gain_v + row * (DP * EP) + square_at(DP, EP), new)


@triton.jit
def _walk(
    n,
    block,
    gain,
    whole,
    start,
    sums,
    rest,
    last,
    chunks,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    own = block * BLOCK + tl.arange(0, BLOCK)
    channels = own // EP
    columns = own % EP
    there = (channels < D) & (columns < E)
    outer = n * (D * E) + channels * E + columns
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        total = tl.load(start + outer, mask=there, other=0.0)
    at = n * chunks * (DP * EP) + own
    whole += n * chunks
    for c in tl.range(0, chunks, num_stages=STAGES):
        new = tl.load(gain + at)
        high = total.to(sums.dtype.element_ty)
        tl.store(sums + at, high)
        if SPLIT:
            tl.store(rest + at, (total - high.to(tl.float32)).to(sums.dtype.element_ty))
        if HAS_DECAY:
            decay = tl.load(whole + c)
            total = tl.where(decay == 0.0, 0.0, total * decay)
        total += new
        at += DP * EP
    tl.store(last + outer, total, mask=there)


@triton.jit(do_not_specialize=["chunks", "key_parts"])
def sums_kernel(
    gain_k,
    gain_v,
    whole,
    start_k,
    start_v,
    keys_sum,
    keys_rest,
    values_sum,
    last_k,
    last_v,
    chunks,
    key_parts,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums before each chunk [N, chunks, DP, DP | EP] and after all keys [N, D, D | E].

    Hkk is stored in two terms with SPLIT. The first `key_parts` programs sum keys.
    """
    program = tl.program_id(0).to(tl.int64)
    if program < key_parts:
        blocks: tl.constexpr = DP * DP // BLOCK
        _walk(
            program // blocks, program % blocks, gain_k, whole, start_k, keys_sum, keys_rest,
            last_k, chunks, D, DP, D, DP, BLOCK, HAS_START, HAS_DECAY, SPLIT, STAGES,
        )  # fmt: skip
    elif VALUES:
        parts: tl.constexpr = DP * EP // BLOCK
        place = program - key_parts
        _walk(
            place // parts, place % parts, gain_v, whole, start_v, values_sum, values_sum,
            last_v, chunks, D, DP, E, EP, BLOCK, HAS_START, HAS_DECAY, False, STAGES,
        )  # fmt: skip
