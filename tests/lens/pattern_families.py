"""Seven families of attention patterns whose members differ in width, place and noise."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FAMILIES = ("self", "previous_column", "row_above", "ring_3", "same_row", "same_column", "uniform")


def families(each: int, side: int = 8, seed: int = 0) -> tuple[Tensor, NDArray[np.int64]]:
    """Maps [7 each, N, N] and the number of each one's family."""
    random = torch.Generator().manual_seed(seed)
    axis = torch.arange(side)
    place = torch.cartesian_prod(axis, axis).double()
    step = place[None] - place[:, None]
    down, right = step.unbind(-1)
    far = step.norm(dim=-1)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((), generator=random, dtype=torch.float64)

    maps, labels = [], []
    for _ in range(each):
        scores = (
            -((far / between(0.4, 1.0)) ** 2),
            -((right + between(0.7, 1.3)) ** 2 + down**2) / between(0.2, 0.6),
            -((down + between(0.7, 1.3)) ** 2 + right**2) / between(0.2, 0.6),
            -((far - between(2.5, 3.5)) ** 2) / between(0.2, 0.5),
            -down.abs() / between(0.1, 0.4),
            -right.abs() / between(0.1, 0.4),
            torch.zeros_like(far),
        )
        for number, family in enumerate(scores):
            noise = 0.2 * torch.randn(far.shape, generator=random, dtype=torch.float64)
            maps.append((family + noise).softmax(-1))
            labels.append(number)
    return torch.stack(maps).float(), np.array(labels)
