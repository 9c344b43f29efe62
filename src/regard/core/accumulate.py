"""Sums of rows by number, the same bits in every run."""

from __future__ import annotations

import torch

__all__ = ["add_rows"]


def add_rows(into: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds `rows` [n, ...] to the rows `numbers` [n] of `into`, in place; numbers may repeat.

    On a processor `index_add_` adds them in their order. On a GPU it adds them by atomics, in an
    order of chance, and rounds differently in every run: `index_put_` sorts the numbers first.

    >>> into = torch.zeros(3, 2)
    >>> add_rows(into, torch.tensor([2, 0, 2]), torch.ones(3, 2))
    >>> into
    tensor([[1., 1.],
            [0., 0.],
            [2., 2.]])
    """
    if into.device.type == "cpu":
        into.index_add_(0, numbers, rows)
    else:
        into.index_put_((numbers,), rows, accumulate=True)
