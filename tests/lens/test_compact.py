"""Small forms of attention weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.lens.compact import as_bytes, coarse_grid, coarse_weights, from_bytes


@pytest.mark.parametrize(("grid", "factor"), [((4, 4), 2), ((5, 3), 2), ((3, 7), 4), ((2, 2), 1)])
def test_blocks(grid: tuple[int, int], factor: int) -> None:
    prefix, (rows, columns) = 2, grid
    tokens = prefix + rows * columns
    weights = torch.randn(3, tokens, tokens, dtype=torch.float64).softmax(-1)
    small = coarse_weights(weights, grid, prefix, factor)
    high, wide = coarse_grid(grid, factor)
    assert small.shape == (3, prefix + high * wide, prefix + high * wide)
    torch.testing.assert_close(small.sum(-1), torch.ones(small.shape[:-1], dtype=torch.float64))
    torch.testing.assert_close(small[:, :prefix, :prefix], weights[:, :prefix, :prefix])
    # Block (0, 0) looks at the last block.
    first = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) // factor
    own = [prefix + n for n, block in enumerate(first.tolist()) if block == [0, 0]]
    last = [
        prefix + r * columns + c
        for r in range((high - 1) * factor, rows)
        for c in range((wide - 1) * factor, columns)
    ]
    wanted = weights[:, own][:, :, last].sum(-1).mean(-1)
    torch.testing.assert_close(small[:, prefix, -1], wanted)


def test_bytes() -> None:
    weights = (3 * torch.randn(2, 3, 9, 9)).softmax(-1)
    codes, most = as_bytes(weights)
    assert codes.dtype == np.uint8
    found = from_bytes(codes, most)
    bound = weights.amax(-1, keepdim=True).numpy() / 255
    assert (np.abs(found - weights.numpy()) <= bound).all()
    codes, most = as_bytes(torch.zeros(1, 4))
    assert from_bytes(codes, most).tolist() == [[0, 0, 0, 0]]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"coarse_weights: weights must be \[..., 17, 17\]"):
        coarse_weights(torch.ones(16, 16), (4, 4), 1, 2)
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        coarse_weights(torch.ones(17, 17), (4, 4), 1, 0)
