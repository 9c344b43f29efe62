"""Every instruction set that runs here computes the same numbers."""

from __future__ import annotations

import ctypes
import math
import os
import shutil

import numpy as np
import pytest

import regard
from regard.native import table
from regard.native.peak import LANES, kernel

ISAS = regard.native.instruction_sets()
FLOATS = ctypes.POINTER(ctypes.c_float)


def pointer(array: np.ndarray) -> ctypes._Pointer:
    return array.ctypes.data_as(FLOATS)


def test_the_build_has_every_set_of_this_machine() -> None:
    compiler = os.environ.get("CC", "cc").split()[0]
    if shutil.which(compiler) is None:
        assert not ISAS
        return
    status = regard.native.status()
    assert status.loaded, status.reason
    assert status.built == tuple(isa.name for isa in table.instruction_sets(os.uname().machine))
    assert set(ISAS) <= set(status.built)
    assert ISAS[-1] == status.built[-1], "the lowest set runs everywhere"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounds", [0, 1, 10])
def test_lanes_end_where_arithmetic_says(isa: str, rounds: int) -> None:
    lanes = np.arange(LANES, dtype=np.float32)
    expected = 2 + (lanes.astype(np.float64) - 2) / 2**rounds  # exact in float32
    operations = kernel(isa)(pointer(lanes), rounds, 0.5, 1.0)
    assert operations == 2 * LANES * rounds
    np.testing.assert_array_equal(lanes, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_integers_add_up_exactly(isa: str) -> None:
    lanes = np.arange(LANES, dtype=np.float32)
    kernel(isa)(pointer(lanes), 100_000, 1.0, 3.0)
    assert lanes.astype(np.int64).sum() == LANES * (LANES - 1) // 2 + LANES * 300_000


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 33, 130])
def test_vector_primitives(isa: str, count: int) -> None:
    check = regard.native.function("test", "vector_check", isa)
    check.argtypes = [FLOATS, FLOATS, FLOATS, ctypes.c_int64, ctypes.c_float]
    check.restype = None
    generator = np.random.default_rng(count)
    # One float into the buffers: no load may need more than 4-byte alignment.
    x = generator.normal(size=count + 1).astype(np.float32)[1:]
    y = generator.normal(size=count + 1).astype(np.float32)[1:]
    if count > 2:
        x[2] = y[1] = math.nan
        x[1] = 1.0
    out = np.full(count + 40, 7.0, dtype=np.float32)
    check(pointer(x), pointer(y), pointer(out[3:]), count, 0.25)
    largest = np.where(x > y, x, y)  # y where either is NaN
    np.testing.assert_array_equal(out[3 : 3 + count], np.where(x > 0.25, largest, 0.25))
    assert (out[:3] == 7).all()
    assert (out[3 + count :] == 7).all()


@pytest.mark.parametrize("isa", ISAS)
def test_peak_of_every_set(isa: str) -> None:
    peak = regard.native.fma_peak(seconds=0.02, isa=isa)
    width = next(s.width for s in table.instruction_sets(os.uname().machine) if s.name == isa)
    # Four vector operations of two floating-point ones per cycle, at 8 GHz, is beyond any core: a
    # loop whose accumulators were merged reports more. The floor is a scalar loop's.
    assert 0.2 < peak < 4 * 2 * width * 8


def test_peak_takes_the_best_set_and_rejects_others() -> None:
    if ISAS:
        assert regard.native.fma_peak(seconds=0.001) > 0
        with pytest.raises(ValueError, match="fma_peak: isa must be one of .*, got 'avx1024'"):
            regard.native.fma_peak(isa="avx1024")
    with pytest.raises(ValueError, match="fma_peak: seconds must be a finite number above 0"):
        regard.native.fma_peak(seconds=0.0)
