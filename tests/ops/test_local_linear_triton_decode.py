"""Decoding kernels in Triton's interpreter: equal to float64, and the promises of the op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gpu.interpreter import interpreted
from regard.core.budgets import budget, relative_error
from regard.core.decay import decay_sums
from regard.ops.local_linear import blockwise
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options
from regard.ops.local_linear.solve import Solver
from regard.ops.local_linear.triton import decode as module

pytestmark = pytest.mark.requires("triton")

EXACT = Options(True, 1e-6, 1e-8, 0, 0, "auto")
JUNK = torch.tensor([torch.nan, torch.inf, -torch.inf])


def make(
    T: int = 1, S: int = 50, D: int = 16, Dv: int = 16, H: int = 2, Hk: int = 1, B: int = 1,
    dtype: torch.dtype = torch.float32, mask: bool = False, bias: int = 0, decay: int = 0,
    probe: bool = False, row_bias: bool = False, absolute: bool = False, **options: Any,
) -> Inputs:  # fmt: skip
    """Keys around 1; ridges per query; with a mask, junk behind it; decays that forget once."""
    torch.manual_seed(S)
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, Hk, S, D) + 1, torch.randn(B, Hk, S, Dv)
    real = torch.rand(B, S) > 0.3 if mask else None
    if real is not None:
        junk = JUNK[torch.arange(S) % 3][None, None, :, None]
        k, v = (torch.where(real[:, None, :, None], x, junk) for x in (k, v))
    steps = -0.3 * torch.rand(B, decay, S)
    if decay:
        steps[:, :, S // 3] = -torch.inf
    given = {
        "key_mask": real,
        "key_bias": torch.randn(B, bias, S) if bias else None,
        "decay": decay_sums(steps, real) if decay else None,
        "row_bias": torch.randn(B, H, T) if row_bias else None,
        "probe": torch.randn(B, H, T, D) if probe else None,
        "causal": True, "window": (-1, -1), "absolute": absolute, **options,
    }  # fmt: skip
    ridge = (torch.rand(B, H, T) + 0.1) * (100 if absolute else 1)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return Inputs(q, k, v, ridge, torch.tensor([[0.25]]), **given)


def expected(inputs: Inputs) -> blockwise.Result:
    """In float64, by the eager form."""
    names = ("q", "k", "v", "ridge", "scale", "row_bias", "probe")
    found = {name: getattr(inputs, name) for name in names}
    wide = replace(inputs, **{n: x if x is None else x.double() for n, x in found.items()})
    if wide.average:
        wide = replace(wide, average=False, probe=torch.zeros_like(wide.q))
    if wide.probe is not None:
        return blockwise.forward_given(wide, wide.probe, 0)
    return blockwise.forward(wide, Solver(True, 1e-12, 200), 0)


def decode(inputs: Inputs, options: Options = EXACT, splits: int = 0, **cut: Any) -> Any:
    path = "regard.ops.local_linear.triton.decode:decode"
    return interpreted(path, inputs, options, module.Cut(**cut) if cut else None, splits)


# fmt: off
CASES: dict[str, dict[str, Any]] = {
    "one query": {},
    "splits": {"splits": 3},
    "odd sizes": {"D": 11, "Dv": 20, "Hk": 2, "S": 33, "splits": 2},
    "window": {"T": 3, "window": (9, -1), "S": 40},
    "mask": {"mask": True, "splits": 2, "B": 2},
    "bias": {"bias": 1},
    "decay of key heads": {"decay": 1, "bias": 2, "mask": True, "splits": 2},
    "every query at the end": {"decay": 2, "causal": False, "T": 2},
    "absolute": {"absolute": True, "row_bias": True},
    "no intercept": {"intercept": False, "splits": 2},
    "more queries than keys": {"T": 4, "S": 2},
    "two programs": {"keys": 32, "warps": 4, "stages": 1, "parts": 2, "lazy": False, "splits": 2},
    "average": {"average": True, "splits": 2},
    "average of many": {
        "average": True, "T": 17, "H": 4, "Hk": 2, "bias": 2, "decay": 4, "mask": True,
    },
    "given": {"probe": True, "splits": 3},
    "given to a group": {"probe": True, "T": 5, "H": 4, "S": 40, "window": (9, -1), "mask": True},
    "given, every query at the end": {"probe": True, "decay": 2, "causal": False, "T": 9, "D": 20},
    "given, more queries than keys": {"probe": True, "T": 4, "S": 2, "row_bias": True},
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_float64(name: str) -> None:
    fields = ("keys", "warps", "stages", "parts", "lazy")
    cut = {x: y for x, y in CASES[name].items() if x in fields}
    rest = {x: y for x, y in CASES[name].items() if x not in cut}
    splits = rest.pop("splits", 0)
    inputs = make(**rest)
    (got, failed), whole = decode(inputs, splits=splits, **cut), expected(inputs)
    assert not failed.any()
    assert relative_error(got.out, whole.out) <= budget(torch.float32)
    assert relative_error(got.slope, whole.slope) <= budget(torch.float32)
    assert relative_error(got.lse.exp(), whole.lse.exp()) <= budget(torch.float32)
    assert (got.lse == -torch.inf).equal(whole.lse == -torch.inf)
    assert got.residual.max() <= 5e-6
    assert (got.iterations.max() > 0) == (inputs.probe is None and not inputs.average)


@pytest.mark.parametrize("options", [{}, {"probe": True}, {"average": True}])
def test_half_precision(options: dict[str, Any]) -> None:
    inputs = make(dtype=torch.float16, S=80, **options)
    (got, _), whole = decode(inputs, splits=2), expected(inputs)
    assert got.out.dtype == torch.float16
    assert relative_error(got.out, whole.out) <= budget(torch.float16)


def test_large_keys_keep_within_half_precision() -> None:
    inputs = make(dtype=torch.float16, S=80)
    large = replace(inputs, k=inputs.k * 4096, scale=inputs.scale / 4096, ridge=inputs.ridge * 1e7)
    (got, failed), whole = decode(large), expected(large)
    assert not failed.any()
    assert relative_error(got.out, whole.out) <= budget(torch.float16)


@pytest.mark.parametrize("options", [{}, {"probe": True}])
def test_later_keys_change_no_bit(options: dict[str, Any]) -> None:
    inputs = make(T=3, **options)
    later = (torch.arange(50) >= 49)[:, None]
    hidden = replace(
        inputs, k=inputs.k.masked_fill(later, -1e30), v=inputs.v.masked_fill(later, 1e30)
    )
    (one, _), (other, _) = decode(inputs), decode(hidden)
    for a, b in zip(one, other, strict=True):
        assert a[:, :, :2].equal(b[:, :, :2])
    assert not one.out[:, :, 2].equal(other.out[:, :, 2])


@pytest.mark.parametrize("options", [{}, {"average": True}])
def test_a_row_alone_gives_the_same_bits(options: dict[str, Any]) -> None:
    inputs = make(B=3, S=600, **options)
    names = ("q", "k", "v", "ridge")
    one = replace(inputs, **{name: getattr(inputs, name)[1:2] for name in names})
    (whole, _), (alone, _) = decode(inputs), decode(one)
    for a, b in zip(whole, alone, strict=True):
        assert a[1:2].equal(b)


@pytest.mark.parametrize("options", [{}, {"probe": True}])
def test_a_cache_is_read_as_it_lies(options: dict[str, Any]) -> None:
    inputs = make(Hk=2, **options)
    roomy = [
        torch.full((1, 70, 2, 16), torch.nan).transpose(1, 2)[:, :, :50] for _ in range(2)
    ]
    for room, x in zip(roomy, (inputs.k, inputs.v), strict=True):
        room.copy_(x)
    spread = inputs.q.new_empty(*inputs.q.shape, 2)[..., 0].copy_(inputs.q)
    strided = replace(inputs, q=spread, k=roomy[0], v=roomy[1])
    assert not strided.k.is_contiguous()
    for a, b in zip(decode(inputs)[0], decode(strided)[0], strict=True):
        assert a.equal(b)


def test_a_row_that_cannot_be_solved_says_so() -> None:
    inputs = make(S=4)
    inputs = replace(inputs, ridge=torch.tensor([[[1e-12]]]))  # four keys, sixteen channels
    got, failed = decode(inputs)
    average, _ = decode(replace(inputs, average=True))
    assert failed.all()
    assert (got.residual == 1).all()
    assert relative_error(got.out, average.out) <= budget(torch.float32)


def test_nothing_to_see() -> None:
    got, failed = decode(make(S=0))
    assert not got.out.any()
    assert (got.lse == -torch.inf).all()
    assert not failed.any()
    assert decode(make(T=0))[0].out.shape == (1, 2, 0, 16)


def test_what_is_not_served_is_said() -> None:
    assert module.serves(make()) is None
    assert "there are 9 queries" in (module.serves(make(T=9)) or "")
    assert "66 queries share a key head" in (module.serves(make(T=33, probe=True)) or "")
    assert module.serves(make(T=9, H=1, average=True)) is None
    assert "head size of 130" in (module.serves(make(Dv=130)) or "")
    assert "eager form" in (module.serves(make(wide=True)) or "")


@pytest.mark.parametrize(
    ("S", "T", "most", "window", "count"),
    [(100, 1, 16, (-1, -1), 1), (16384, 1, 16, (-1, -1), 16), (16384, 2, 2, (-1, -1), 2),
     (16384, 8, 0, (-1, -1), 1), (131072, 1, 256, (-1, -1), 128), (131072, 1, 256, (999, 0), 3)],
)  # fmt: skip
def test_splits_cover_the_keys(
    S: int, T: int, most: int, window: tuple[int, int], count: int
) -> None:
    splits, chunk = module.splits_of(T, S, window, most)
    assert splits == count
    span = min(S, 1 + window[0] + T) if window[0] >= 0 else S
    assert splits * chunk >= span > (splits - 1) * chunk
