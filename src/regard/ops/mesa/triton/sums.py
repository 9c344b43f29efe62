"""The two sums of Mesa, Hkk and Hkv, before every chunk: decayed sums of beta k [k | v]^T.

What a chunk adds is a product, and costs less to form than to read. So a segment of chunks is
walked over twice: for what all of it adds, and, when a scan over segments has told what was before
it, for the sums before each of its chunks. A call of one segment needs the second walk only.
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


@triton.jit
def _after(
    total, k, other, beta, facts, plane, chunk, kt, ot, bt, T,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, HAS_DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A sum [DP, EP] after a chunk, from that before it; and the decay of the chunk [1]."""
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = rows_at(k, tokens, kt, T, D, DP)
    others = rows_at(other, tokens, ot, T, E, EP)
    place = beta + tokens.to(tl.int64) * bt
    weight = tl.load(place, mask=tokens < T, other=0.0).to(tl.float32)
    whole = tl.full([1], 1.0, tl.float32)
    if HAS_DECAY:
        high, low, cuts = sums_at(facts, plane, tokens, HAS_DECAY)
        end = chunk * CHUNK + CHUNK - 1 + tl.arange(0, 1)
        high_end, low_end, cuts_end = sums_at(facts, plane, end, HAS_DECAY)
        after, _ = between(
            high_end, low_end, cuts_end, high, low, cuts, tokens == tokens, HAS_DECAY
        )
        weight = weight * after
        whole = entering(high_end, low_end, cuts_end, HAS_DECAY)
        total = tl.where((whole == 0.0)[:, None], 0.0, total * whole[:, None])
    # What is computed is the second operand: the first one would stay in registers.
    weighed = kept(others.to(tl.float32), weight).to(OPERAND)
    turned = tl.trans(keys.to(OPERAND))
    return tl.dot(turned, weighed, total, input_precision=PRECISION), whole


@triton.jit
def _whole_segment(
    k, other, beta, facts, plane, gain, whole_out, n, segment, segments, length, kt, ot, bt, T,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, HAS_DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([DP, EP], tl.float32)
    through = tl.full([1], 1.0, tl.float32)
    for chunk in tl.range(segment * length, (segment + 1) * length):
        total, whole = _after(
            total, k, other, beta, facts, plane, chunk, kt, ot, bt, T, D, DP, E, EP, HAS_DECAY,
            OPERAND, PRECISION,
        )  # fmt: skip
        through = through * whole
    place = n * segments + segment + 1
    tl.store(gain + place * (DP * EP) + square_at(DP, EP), total)
    if HAS_DECAY:
        tl.store(whole_out + place + tl.arange(0, 1), through)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "length", "key_parts"])
def segments_kernel(
    k, v, beta, facts, gain_k, gain_v, whole,
    kb, kh, kt, vb, vh, vt, bb, bh, bt, T, chunks, plane, segments, length, key_parts,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    VALUES: tl.constexpr, HAS_DECAY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What segments but the last add, in gain_k, gain_v [N, segments, DP, DP | EP], and decay.

    Segment s goes to place s + 1. The first `key_parts` programs sum keys.
    """
    program = tl.program_id(0)
    part = program % key_parts
    segment = part % (segments - 1)
    n = (part // (segments - 1)).to(tl.int64)
    b = n // HK
    h = n % HK
    k += b * kb + h * kh
    beta += b * bb + h * bh
    facts += n * (chunks * CHUNK)
    if program < key_parts:
        _whole_segment(
            k, k, beta, facts, plane, gain_k, whole, n, segment, segments, length, kt, kt, bt, T,
            D, DP, D, DP, HAS_DECAY, OPERAND, PRECISION,
        )  # fmt: skip
    elif VALUES:
        _whole_segment(
            k, v + b * vb + h * vh, beta, facts, plane, gain_v, whole, n, segment, segments,
            length, kt, vt, bt, T, D, DP, E, EP, HAS_DECAY, OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit
def _outer(n, own, D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """Where numbers `own` of a sum [DP, EP] are in one [N, D, E], and whether they are."""
    channels = own // EP
    columns = own % EP
    return n * (D * E) + channels * E + columns, (channels < D) & (columns < E)


@triton.jit
def _scan(
    gain, whole, start, n, block, segments,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
    HAS_START: tl.constexpr, HAS_DECAY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    own = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        outer, there = _outer(n, own, D, E, EP)
        total = tl.load(start + outer, mask=there, other=0.0)
    at = gain + n * segments * (DP * EP) + own
    tl.store(at, total)
    for s in tl.range(1, segments, num_stages=STAGES):
        at += DP * EP
        new = tl.load(at)
        if HAS_DECAY:
            decay = tl.load(whole + n * segments + s)
            total = tl.where(decay == 0.0, 0.0, total * decay)
        total += new
        tl.store(at, total)


@triton.jit(do_not_specialize=["segments", "key_parts"])
def scan_kernel(
    gain_k, gain_v, whole, start_k, start_v, segments, key_parts,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
    VALUES: tl.constexpr, HAS_START: tl.constexpr, HAS_DECAY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """In place: what segments add becomes the sums before each of them, from start_k, start_v."""
    program = tl.program_id(0).to(tl.int64)
    if program < key_parts:
        blocks: tl.constexpr = DP * DP // BLOCK
        _scan(
            gain_k, whole, start_k, program // blocks, program % blocks, segments, D, DP, D, DP,
            BLOCK, HAS_START, HAS_DECAY, STAGES,
        )  # fmt: skip
    elif VALUES:
        parts: tl.constexpr = DP * EP // BLOCK
        place = program - key_parts
        _scan(
            gain_v, whole, start_v, place // parts, place % parts, segments, D, DP, E, EP, BLOCK,
            HAS_START, HAS_DECAY, STAGES,
        )  # fmt: skip


@triton.jit
def _walk(
    k, other, beta, facts, plane, gain, start, sums, rest, last, n, segment, segments, length,
    chunks, kt, ot, bt, T,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SPLIT: tl.constexpr,
    SCANNED: tl.constexpr, HAS_START: tl.constexpr, HAS_DECAY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, DP), tl.arange(0, EP)
    there = (rows < D)[:, None] & (columns < E)[None, :]
    outer = n * (D * E) + rows[:, None] * E + columns[None, :]
    total = tl.zeros([DP, EP], tl.float32)
    if SCANNED:
        total = tl.load(gain + (n * segments + segment) * (DP * EP) + square_at(DP, EP))
    elif HAS_START:
        total = tl.load(start + outer, mask=there, other=0.0)
    for chunk in tl.range(segment * length, tl.minimum((segment + 1) * length, chunks)):
        at = (n * chunks + chunk) * (DP * EP) + square_at(DP, EP)
        high = total.to(sums.dtype.element_ty)
        tl.store(sums + at, high)
        if SPLIT:
            tl.store(rest + at, (total - high.to(tl.float32)).to(sums.dtype.element_ty))
        total, _ = _after(
            total, k, other, beta, facts, plane, chunk, kt, ot, bt, T, D, DP, E, EP, HAS_DECAY,
            OPERAND, PRECISION,
        )  # fmt: skip
    if segment == segments - 1:
        tl.store(last + outer, total, mask=there)


@triton.jit(do_not_specialize=["T", "chunks", "segments", "length", "key_parts"])
def sums_kernel(
    k, v, beta, facts, gain_k, gain_v, start_k, start_v, keys_sum, keys_rest, values_sum,
    last_k, last_v,
    kb, kh, kt, vb, vh, vt, bb, bh, bt, T, chunks, plane, segments, length, key_parts,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    VALUES: tl.constexpr, SPLIT: tl.constexpr, SCANNED: tl.constexpr, HAS_START: tl.constexpr,
    HAS_DECAY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums before each chunk [N, chunks, DP, DP | EP] and after all keys [N, D, D | E].

    Hkk is stored in two terms with SPLIT. SCANNED: sums before segments are in gain_k, gain_v;
    else there is one segment, and start_k, start_v come before it. The first `key_parts` programs
    sum keys.
    """
    program = tl.program_id(0)
    part = program % key_parts
    segment = part % segments
    n = (part // segments).to(tl.int64)
    b = n // HK
    h = n % HK
    k += b * kb + h * kh
    beta += b * bb + h * bh
    facts += n * (chunks * CHUNK)
    if program < key_parts:
        _walk(
            k, k, beta, facts, plane, gain_k, start_k, keys_sum, keys_rest, last_k, n, segment,
            segments, length, chunks, kt, kt, bt, T, D, DP, D, DP, SPLIT, SCANNED, HAS_START,
            HAS_DECAY, OPERAND, PRECISION,
        )  # fmt: skip
    elif VALUES:
        _walk(
            k, v + b * vb + h * vh, beta, facts, plane, gain_v, start_v, values_sum, values_sum,
            last_v, n, segment, segments, length, chunks, kt, vt, bt, T, D, DP, E, EP, False,
            SCANNED, HAS_START, HAS_DECAY, OPERAND, PRECISION,
        )  # fmt: skip
