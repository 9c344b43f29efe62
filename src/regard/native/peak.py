"""The processor's peak of multiply-and-add operations: the yardstick of the benchmarks."""

from __future__ import annotations

import ctypes
import time

from regard.core.checks import check_number
from regard.native.loader import function

LANES = 384  # REGARD_LANES of fma_peak.c
_ROUNDS = 20_000  # about 0.1 to 3 ms: long against a call and the clock, short against a neighbour
_POINTER = ctypes.POINTER(ctypes.c_float)


def fma_peak(seconds: float = 0.05, isa: str | None = None) -> float:
    """GFLOP/s of one thread that only multiplies and adds in registers.

    Formula: 384 numbers go through `x <- x * m + a`, two operations each, in as many accumulators
    as hide the latency of the instruction; the best of the samples that fit into `seconds`.
    Precision: float32, as every native kernel computes. Cost: `seconds` of CPU time of the calling
    thread, at least one sample. Source: plain C, `fma_peak.c`; fused where the instruction set has
    a fused instruction. Limits: says nothing of memory.

    A benchmark takes it before and after: a native kernel is judged by the share of this peak that
    it reaches, and a sample during which the peak moved was disturbed.

    `isa=None` uses the best of `regard.native.instruction_sets()`. Raises `NativeUnavailable`
    without the native library, `ValueError` for an instruction set that machine or build lack.

    >>> import regard
    >>> not regard.native.instruction_sets() or regard.native.fma_peak(seconds=0.001) > 0
    True
    """
    check_number("fma_peak", "seconds", seconds, above=0)
    run = kernel(isa)
    lanes = (ctypes.c_float * LANES)(*range(LANES))
    best = spent = 0.0
    while spent < seconds:
        start = time.thread_time()
        operations = run(lanes, _ROUNDS, 0.5, 1.0)
        took = time.thread_time() - start
        spent += max(took, 1e-6)  # of a clock that stands still, too, the loop ends
        if took > 0:
            best = max(best, operations / took)
    return best / 1e9


def kernel(isa: str | None = None):
    """The C function (float lanes[384], int64 rounds, float m, float a) -> operations done."""
    run = function("fma_peak", "fma_peak", isa)
    run.argtypes = [_POINTER, ctypes.c_int64, ctypes.c_float, ctypes.c_float]
    run.restype = ctypes.c_double
    return run
