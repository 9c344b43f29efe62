"""Sums of rows by number, the same bits in every run."""

from __future__ import annotations

import torch

__all__ = ["add_rows", "rows_by", "sums_by"]


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


def rows_by(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Rows `numbers` [..., m] of x [..., n, D]: [..., m, D]; numbers may repeat.

    Their gradients are summed as `add_rows` sums: torch differentiates `index_select` by
    `index_add_`, and indexing by `index_put_`.

    >>> rows_by(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0, 1])).flatten()
    tensor([2., 1., 2.])
    >>> rows_by(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1], [0]])).flatten()
    tensor([2., 3.])
    """
    several, (n, D) = x.shape[:-2], x.shape[-2:]
    numbers = numbers.expand(*several, -1)
    if several:
        numbers = numbers + (torch.arange(several.numel(), device=x.device) * n).view(*several, 1)
    flat, at = x.reshape(-1, D), numbers.flatten()
    found = flat.index_select(0, at) if x.device.type == "cpu" else flat[at]
    return found.view(*numbers.shape, D)


def sums_by(values: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Sums [..., count] of values [..., n] by their numbers [..., n], in the same way.

    >>> sums_by(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 0, 1]]), 3)
    tensor([[2., 5., 0.]])
    """
    rows = values.shape[:-1]
    found = values.new_zeros(rows.numel() * count)
    first = torch.arange(rows.numel(), device=values.device)[:, None] * count
    numbers = numbers.expand(values.shape).reshape(rows.numel(), -1) + first
    add_rows(found, numbers.flatten(), values.flatten())
    return found.view(*rows, count)
