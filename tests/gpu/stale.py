"""Fresh memory that holds what another call may have left there: anything.

A kernel that reads what no kernel wrote is right or wrong by chance, as memory that was freed
comes back on a GPU as it was. The interpreter's fresh memory is NaN, which a maximum ignores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LARGE = 3e38
MAKERS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
    (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
)  # fmt: skip


def stale(x: torch.Tensor, value: float) -> torch.Tensor:
    """x, filled with `value` or the largest of its dtype; integers with the largest there are."""
    if x.dtype == torch.bool or x.is_meta:
        return x
    if x.is_floating_point():
        largest = torch.finfo(x.dtype).max
        return x.detach().fill_(largest if largest < value < torch.inf else value)
    return x.fill_(torch.iinfo(x.dtype).max)


@contextmanager
def stale_memory(value: float = LARGE) -> Iterator[None]:
    """Within it, torch's functions for memory that is not set return it filled with `value`."""
    own = [getattr(place, name) for place, name in MAKERS]

    def filling(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *arguments, **named: stale(make(*arguments, **named), value)

    try:
        for (place, name), make in zip(MAKERS, own, strict=True):
            setattr(place, name, filling(make))
        yield
    finally:
        for (place, name), make in zip(MAKERS, own, strict=True):
            setattr(place, name, make)
