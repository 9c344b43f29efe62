"""Conjugate gradients on many small systems at once, each row minding only itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    tol: float,
    limit: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves A_i x_i = right_i [n, M, D] from x = start (or 0); `apply(p)` gives the A_i p_i.

    A row stops at |residual| <= tol |right| and is frozen from then on, so that its result does
    not depend on how long its neighbours take. Returns x, the iterations of each row (int32
    [n, M, 1]) and its relative residual. Whether all rows have stopped is asked once an
    iteration (a synchronisation on a GPU), never with tol = 0.

    A row that has stopped goes on along with the others but makes steps of length 0.

    A row whose numbers leave the range of the dtype stops where it is, or at x = 0. So does one
    that after D steps, enough in exact arithmetic, is further from a solution than x = 0: its
    system is singular to the precision of the dtype.
    """
    x, r = torch.zeros_like(right), right
    size = whole = _square(right)
    if start is not None:
        x, r = start, right - apply(start)
        size = _square(r)
    goal = whole * (tol * tol)
    active = (size > goal) & (size < math.inf)
    p = torch.where(active, r, 0.0)
    steps = torch.zeros(size.shape, dtype=torch.int32, device=size.device)
    for iteration in range(limit):
        if (iteration or start is not None) and tol > 0 and not bool(active.any()):
            break
        y = apply(p)
        curvature = (p * y).sum(-1, keepdim=True)
        active = active & (curvature > 0) & (curvature < math.inf)
        step = torch.where(active, size / curvature, 0.0)
        x = torch.addcmul(x, step, p)
        r = torch.addcmul(r, step, y, value=-1)
        new = torch.where(active, _square(r), size)
        steps += active
        active = active & (new > goal) & (new < math.inf)
        p = torch.addcmul(r, torch.where(active, new / size, 0.0), p)
        size = new
    solved = x.isfinite().all(-1, keepdim=True) & ~((steps >= x.shape[-1]) & (size > whole))
    residual = torch.where(whole > 0, (size / whole).sqrt(), 0.0)
    return torch.where(solved, x, 0.0), steps, torch.where(solved, residual, 1.0)


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True)
