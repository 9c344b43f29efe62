"""Sums of rows by number."""

from __future__ import annotations

import pytest
import torch

from regard.core.accumulate import add_rows, sums_by


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_a_product_with_one_hot_rows(device, dtype):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 3, 5, generator=g, dtype=dtype).to(device)
    numbers = torch.randint(9, (500,), generator=g).to(device)
    start = torch.randn(9, 3, 5, generator=g, dtype=dtype).to(device)
    into = start.clone()
    add_rows(into, numbers, rows)
    wanted = start.double()
    chosen = torch.nn.functional.one_hot(numbers, 9).double()
    wanted = wanted + torch.einsum("nr,nhd->rhd", chosen, rows.double())
    torch.testing.assert_close(into.double(), wanted, rtol=1e-5, atol=1e-5)


def test_same_bits_in_every_run(device):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 4, generator=g).to(device)
    numbers = torch.randint(3, (20_000,), generator=g).to(device)

    def once():
        into = torch.zeros(3, 4, device=device)
        add_rows(into, numbers, rows)
        return into

    first = once()
    assert all(torch.equal(first, once()) for _ in range(5))


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40)])
def test_sums_of_values_by_their_numbers(device, shape):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=g, dtype=torch.float64).to(device)
    numbers = torch.randint(7, shape, generator=g).to(device)
    wanted = torch.zeros(*shape[:-1], 7, dtype=torch.float64, device=device)
    wanted = wanted.scatter_add(-1, numbers, values)
    torch.testing.assert_close(sums_by(values, numbers, 7), wanted)
    row = numbers.flatten()[: shape[-1]]  # one row of numbers for all
    torch.testing.assert_close(
        sums_by(values, row, 7), wanted.zero_().scatter_add(-1, row.expand(shape), values)
    )
