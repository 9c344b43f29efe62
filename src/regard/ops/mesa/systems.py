"""The ridge systems of a chunk, (Hkk_t + R) x_t = q_t: one for every row, three ways to solve.

    Hkk_t = w_t Hkk + sum_{j <= t, in chunk} w_tj beta_j k_j k_j^T       w: products of decays

By conjugate gradients, which only apply Hkk_t; by Cholesky's method, for which all of them are
built as one product, in panels; and by the authors' iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.linear.chunks import Chunks
from regard.ops.linear.decays import Run
from regard.ops.local_linear.cg import conjugate_gradient

PANEL = 1 << 22  # elements of the matrices that are held at once
GUARD = 1e-5  # what the authors add to both denominators


class Solver(NamedTuple):
    """How rows are solved: "direct", "cg", "official" or "official_step"."""

    method: str
    tol: float
    limit: int


def solve_rows(
    chunks: Chunks,
    rows: Tensor,
    keys: Tensor,
    weighted: Tensor,
    past: Tensor,
    ridge: Tensor,
    run: Run | None,
    solver: Solver,
) -> Tensor:
    """x of the rows [N, G m, D] of one chunk.

    keys and weighted (beta k) [N, m, D], past [N, D, D], ridge [N, 1 | G, 1, D].
    """
    if solver.method == "direct":
        return _direct(chunks, rows, keys, weighted, past, ridge, run)
    N, G, (_, m, D) = chunks.N, chunks.G, keys.shape

    def matrix(x: Tensor) -> Tensor:
        scores = chunks.cut(x @ keys.mT, run)
        if run is not None:
            scores = scores.mul_(run.inside[:, None])
        old = chunks.scale_rows(x @ past.mT, run)
        penalty = (x.view(N, G, m, D) * ridge).view_as(x)
        return torch.baddbmm(old, scores.flatten(1, 2), weighted) + penalty

    start = None
    if solver.method == "official_step":  # the authors' decoding starts at Jacobi's guess
        squares = weighted * keys + past.diagonal(dim1=1, dim2=2)[:, None] * _whole(run)
        start = (rows.view(N, G, m, D) / (squares[:, None] + ridge)).view_as(rows)
    return _iterate(matrix, rows, start, solver)


def solve_shared(rows: Tensor, past: Tensor, ridge: Tensor, solver: Solver) -> Tensor:
    """x of rows [N, G, T, D] that all read one matrix [N, D, D]; ridge [N, 1 | G, 1, D]."""
    if solver.method == "direct":
        system = past[:, None] + torch.diag_embed(ridge[:, :, 0])
        if ridge.shape[1] == 1:  # one factor serves all rows of the group
            return _factorised(system[:, 0], rows.flatten(1, 2).mT).mT.reshape(rows.shape)
        return _factorised(system, rows.mT).mT.contiguous()
    N, G, T, D = rows.shape

    def matrix(x: Tensor) -> Tensor:
        return x @ past.mT + (x.view(N, G, T, D) * ridge).view_as(x)

    return _iterate(matrix, rows.reshape(N, G * T, D), None, solver).view(rows.shape)


def _iterate(
    matrix: Callable[[Tensor], Tensor], rows: Tensor, start: Tensor | None, solver: Solver
) -> Tensor:
    if solver.method != "cg":
        return _official(matrix, rows, start, solver.limit)
    return conjugate_gradient(matrix, rows, solver.tol, solver.limit)[0]


def _official(
    matrix: Callable[[Tensor], Tensor], right: Tensor, start: Tensor | None, limit: int
) -> Tensor:
    """The released iteration: a fixed number of steps, absolute guards in both quotients."""
    x = torch.zeros_like(right) if start is None else start
    r = right if start is None else right - matrix(start)
    p, size = r, (r * r).sum(-1, keepdim=True)
    for _ in range(limit):
        y = matrix(p)
        step = size / ((p * y).sum(-1, keepdim=True) + GUARD)
        x, r = x + step * p, r - step * y
        new = (r * r).sum(-1, keepdim=True)
        p, size = r + new / (size + GUARD) * p, new
    return x


def _direct(
    chunks: Chunks,
    rows: Tensor,
    keys: Tensor,
    weighted: Tensor,
    past: Tensor,
    ridge: Tensor,
    run: Run | None,
) -> Tensor:
    N, G, (_, m, D), shared = chunks.N, chunks.G, keys.shape, ridge.shape[1] == 1
    out = torch.empty_like(rows).view(N, G, m, D)
    queries = rows.view(N, G, m, D)
    step = max(1, PANEL // max(1, m * D * D * (1 if shared else G)))
    seen = chunks.earlier[:m, :m].expand(N, m, m) if run is None else run.seen_inside
    for a in range(0, N, step):
        part = slice(a, a + step)
        outer = (weighted[part, :, :, None] * keys[part, :, None, :]).flatten(2)
        # A key whose square overflows must not reach the rows before it as 0 * inf.
        lost = ~outer.isfinite().all(-1)
        outer = outer.masked_fill(lost[..., None], 0.0)
        weights = seen[part].to(rows.dtype) if run is None else run.inside[part]
        matrices = (weights @ outer).view(-1, m, D, D)
        old = past[part, None]
        if run is None:
            matrices = matrices + old
        else:
            kept = (old * run.entering[part, ..., None]).masked_fill_(
                ~run.seen_entering[part, ..., None], 0.0
            )
            matrices = matrices + kept
        penalty = torch.diag_embed(ridge[part])  # [n, 1 | G, 1, D, D]
        if shared:
            right = queries[part].permute(0, 2, 3, 1)
            found = _factorised(matrices + penalty[:, 0], right).permute(0, 3, 1, 2)
        else:
            found = _factorised(matrices[:, None] + penalty, queries[part][..., None])[..., 0]
        blind = (seen[part] & lost[:, None, :]).any(-1)
        out[part] = found.masked_fill(blind[:, None, :, None], 0.0)
    return out.view_as(rows)


def _factorised(system: Tensor, right: Tensor) -> Tensor:
    """system^-1 right; columns that are no numbers (the system overflowed) give 0."""
    factor = torch.linalg.cholesky_ex(system)[0]
    x = torch.cholesky_solve(right, factor)
    return torch.where(x.isfinite().all(-2, keepdim=True), x, 0.0)


def _whole(run: Run | None) -> Tensor | float:
    """The decay of the state up to each token of the chunk, [N, m, 1]."""
    return 1.0 if run is None else run.entering.masked_fill(~run.seen_entering, 0.0)
