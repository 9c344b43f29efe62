"""The headers that native forms share: 2^x, packed panels, threads."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from regard.native import chosen, function, instruction_sets, limited_to

ISAS = instruction_sets()
INF, NAN = float("inf"), float("nan")
INTEGER, POINTER = ctypes.c_int64, ctypes.c_void_p

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library here")


def call(isa: str, name: str, *arguments: Any) -> int:
    """An exported function: arrays and tensors by pointer, everything else as an integer."""
    run = function("test", name, isa)
    run.restype = INTEGER
    values = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            values.append(POINTER(x.data_ptr()))
        elif isinstance(x, np.ndarray):
            values.append(POINTER(x.ctypes.data))
        else:
            values.append(POINTER(None) if x is None else INTEGER(x))
    return run(*values)


def exp2(isa: str, x: np.ndarray) -> np.ndarray:
    x, out = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
    call(isa, "exp2_check", x, out, len(x))
    return out


@pytest.mark.parametrize("isa", ISAS)
def test_powers_of_two(isa: str):
    whole = np.arange(-100, 101, dtype=np.float32)
    np.testing.assert_array_equal(exp2(isa, whole), np.exp2(whole.astype(np.float64)))
    x = np.linspace(-100, 60, 400_003).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(exp2(isa, x) / exact - 1).max() < 1e-7  # 8e-8 where products are fused


@pytest.mark.parametrize("isa", ISAS)
def test_powers_of_two_at_the_edges(isa: str):
    found = exp2(isa, np.array([-INF, -1e30, -100.01, -100.0, NAN, 0.0, -0.0]))
    np.testing.assert_array_equal(found, [0, 0, 0, 2.0**-100, NAN, 1, 1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("count", "channels"), [(1, 1), (7, 5), (96, 16), (130, 9), (250, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_panels(isa: str, count: int, channels: int, dtype: torch.dtype):
    lanes = call(isa, "lanes_check")
    generator = torch.Generator().manual_seed(count)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    keys = normal(count + 5, channels).to(dtype)
    index = torch.randperm(count + 5, generator=generator)[:count].int()
    centre, x, p, constant = (
        normal(channels), normal(channels, lanes), normal(count, lanes), normal(lanes)
    )  # fmt: skip
    kind = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
    t, y = torch.empty(count, lanes), torch.empty(channels, lanes)
    failed = call(
        isa, "panel_check", keys, kind, index, count, channels, 96, centre, x, p, constant, 0, t, y
    )
    assert not failed
    k = keys[index.long()].float().double() - centre
    products = p * (k @ x.double() + constant)
    assert (t - products).norm() < 1e-6 * products.norm()
    expected = k.T @ products
    assert (y - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("isa", ISAS)
def test_a_hidden_key_adds_nothing_whatever_it_is(isa: str):
    """A weight of 0 meets an infinite product."""
    lanes, channels, count = call(isa, "lanes_check"), 6, 40
    generator = torch.Generator().manual_seed(1)
    keys, x = torch.randn(count, channels, generator=generator), torch.ones(channels, lanes)
    p = torch.rand(count, lanes, generator=generator)
    p[10:20] = 0
    results = []
    for junk in (0.0, 3e38):
        keys[10:20] = junk
        t, y = torch.empty(count, lanes), torch.empty(channels, lanes)
        centre = torch.full((channels,), -1e38)
        zero = torch.zeros(lanes)
        call(isa, "panel_check", keys, 0, None, count, channels, 96, centre, x, p, zero, 1, t, y)
        results.append((t, y))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("isa", ISAS)
def test_half_precision_is_read_exactly(isa: str):
    """Every float16 there is, subnormals, infinities and NaN too."""
    lanes = call(isa, "lanes_check")
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    keys = bits.view(torch.float16)[:, None]
    t, y = torch.empty(len(keys), lanes), torch.empty(1, lanes)
    one, zero = torch.ones(1, lanes), torch.zeros(lanes)
    weights = torch.ones(len(keys), lanes)
    call(isa, "panel_check", keys, 2, None, len(keys), 1, 96, None, one, weights, zero, 0, t, y)
    expected = keys[:, 0].float().nan_to_num(nan=7.0, posinf=INF, neginf=-INF)
    assert torch.equal(t[:, 0].nan_to_num(nan=7.0, posinf=INF, neginf=-INF), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [0, 1, 2, 7])
def test_threads_meet_at_the_barrier(isa: str, threads: int):
    rounds, count = 20, 50
    counters, seen = np.zeros(rounds, np.int64), np.zeros((rounds, count), np.int64)
    assert call(isa, "threads_check", threads, rounds, count, counters, seen) == max(threads, 1)
    np.testing.assert_array_equal(seen, np.outer(np.arange(1, rounds + 1), np.arange(count)))


def test_a_set_can_be_forced_down():
    assert chosen() == ISAS[0]
    with limited_to(ISAS[-1]):
        assert chosen() == ISAS[-1]
        with limited_to(ISAS[0]):
            assert chosen() == ISAS[0]
        assert chosen() == ISAS[-1]
    assert chosen() == ISAS[0]
    with pytest.raises(ValueError, match="limited_to: isa must be one of"), limited_to("mmx"):
        pass
