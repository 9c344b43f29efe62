"""From chunk to chunk: the state before each, S' = (g I - P) S + N, and back, its gradient.

The state is held as S^T, so that the product has the state on its left, in registers. Forward
and backward walks are independent, and run beside each other.
"""

# Triton rewrites what is between "def" and its end; a type checker takes it for Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.ops.linear.triton_delta.tile import square_at


@triton.jit
def _walk(
    n,
    block,
    start,
    whole,
    passing,
    gain,
    states,
    last,
    chunks,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = block * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, FP)
    there = (rows < E)[:, None] & (channels < F)[None, :]
    outer = n.to(tl.int64) * (F * E) + rows[:, None] + channels[None, :] * E
    state = tl.zeros([ROWS, FP], tl.float32)
    if HAS_START:
        state = tl.load(start + outer, mask=there, other=0.0)
    offsets = block * (ROWS * FP) + square_at(ROWS, FP)
    matrix = square_at(FP, FP)
    whole += n.to(tl.int64) * chunks
    passing += n.to(tl.int64) * chunks * (FP * FP)
    gain += n.to(tl.int64) * chunks * (EP * FP)
    states += n.to(tl.int64) * chunks * (EP * FP)
    first = chunks * 0
    if REVERSE:
        first = chunks - 1
    decay = 1.0
    if HAS_DECAY:
        decay = tl.load(whole + first)
    for c in tl.range(0, chunks, num_stages=STAGES):
        at = c
        following = tl.minimum(c + 1, chunks - 1)
        if REVERSE:
            at = chunks - 1 - c
            following = tl.maximum(at - 1, 0)
        p = tl.load(passing + at.to(tl.int64) * (FP * FP) + matrix)
        new = tl.load(gain + at.to(tl.int64) * (EP * FP) + offsets).to(tl.float32)
        tl.store(states + at.to(tl.int64) * (EP * FP) + offsets, state.to(states.dtype.element_ty))
        if REVERSE:
            p = tl.trans(p)
        through = tl.dot(state.to(OPERAND), p.to(OPERAND), input_precision=PRECISION)
        if HAS_DECAY:
            state = tl.where(decay == 0.0, 0.0, state * decay - through) + new
            decay = tl.load(whole + following)
        else:
            state = state - through + new
    tl.store(last + outer, state, mask=there)


@triton.jit(do_not_specialize=["chunks", "walks"])
def scan_kernel(
    whole,
    passing,
    start,
    gain,
    states,
    last,
    start_back,
    gain_back,
    states_back,
    last_back,
    chunks,
    walks,
    F: tl.constexpr,
    FP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes states [N, chunks, EP, FP], those before each chunk, and the last [N, F, E].

    Without HAS_START there is nothing before the first. whole, passing and gain are as
    `system_kernel` leaves them. BACKWARD programs, with FORWARD those after the first `walks`, go
    from the last chunk to the first, from the gradient of the last state; states_back are the
    gradients of the states after each chunk.
    """
    blocks: tl.constexpr = EP // ROWS
    program = tl.program_id(0)
    if FORWARD and BACKWARD:
        if program >= walks:
            place = program - walks
            _walk(
                place // blocks, place % blocks, start_back, whole, passing, gain_back,
                states_back, last_back, chunks, F, FP, E, EP, ROWS, True, HAS_DECAY, True,
                OPERAND, PRECISION, STAGES,
            )  # fmt: skip
        else:
            _walk(
                program // blocks, program % blocks, start, whole, passing, gain, states, last,
                chunks, F, FP, E, EP, ROWS, HAS_START, HAS_DECAY, False, OPERAND, PRECISION,
                STAGES,
            )  # fmt: skip
    elif FORWARD:
        _walk(
            program // blocks, program % blocks, start, whole, passing, gain, states, last,
            chunks, F, FP, E, EP, ROWS, HAS_START, HAS_DECAY, False, OPERAND, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _walk(
            program // blocks, program % blocks, start_back, whole, passing, gain_back,
            states_back, last_back, chunks, F, FP, E, EP, ROWS, True, HAS_DECAY, True, OPERAND,
            PRECISION, STAGES,
        )  # fmt: skip
