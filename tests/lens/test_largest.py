"""The largest numbers of rows: as `torch.topk` finds them, with every set of instructions."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.lens.largest import MOST, largest

ISAS = regard.native.instruction_sets()


def check(x: torch.Tensor, count: int) -> None:
    values, places = largest(x, count)
    expected = x.topk(count, -1).values
    assert torch.equal(values.nan_to_num(7e7), expected.nan_to_num(7e7))
    assert places.dtype == torch.int32
    assert torch.equal(x.gather(-1, places.long()).nan_to_num(7e7), expected.nan_to_num(7e7))
    assert all(len(set(row)) == count for row in places.flatten(0, -2).tolist()), "a place twice"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 2, 5, 16, 33, 130, 257])
def test_as_topk(isa: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 3, 5, width, generator=generator)
    few = torch.randint(3, x.shape, generator=generator).float()  # many that are equal
    with regard.native.limited_to(isa):
        for count in {1, 2, 4, 7, MOST} & set(range(width + 1)):
            check(x, count)
            check(few, count)
            check(x.mT.contiguous().mT, count)  # rows that do not lie in one piece


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number(isa: str) -> None:
    x = torch.randn(6, 40)
    x[0, 3], x[0, 37] = math.nan, math.nan
    x[1] = -math.inf
    x[2, :38] = -math.inf
    x[3, 1::2], x[3, 0] = math.inf, math.nan
    x[4] = math.nan
    x[5] = 0.0
    with regard.native.limited_to(isa):
        for count in (1, 3, 5):
            check(x, count)


def test_other_tensors() -> None:
    check(torch.randn(3, 50), MOST + 1)
    check(torch.randn(3, 50, dtype=torch.float64), 4)
    check(torch.randn(3, 50).bfloat16(), 1)
    assert largest(torch.randn(0, 5), 2)[0].shape == (0, 2)
    assert largest(torch.randn(2, 5), 0)[0].shape == (2, 0)
