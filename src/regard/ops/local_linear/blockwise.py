"""The forward, block by block: weights, mean key, a solve, output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.local_linear.diagonal import joined
from regard.ops.local_linear.layout import Block, Inputs, Workspace
from regard.ops.local_linear.solve import Solver, System
from regard.ops.local_linear.tiles import LOG2E, Heads, walk


class Result(NamedTuple):
    """The results of the registered op, in its order."""

    out: Tensor  # [B, H, T, Dv], q's dtype
    slope: Tensor  # [B, H, T, D]
    lse: Tensor  # [B, H, T], log-sum-exp of the scores
    iterations: Tensor  # [B, H, T], int32
    residual: Tensor  # [B, H, T]


def empty_result(inputs: Inputs) -> Result:
    """What rows without a key give."""
    q, dtype = inputs.q, inputs.dtype
    rows = q.shape[:3]
    return Result(
        q.new_zeros(*rows, inputs.v.shape[3]),
        torch.zeros(q.shape, dtype=dtype, device=q.device),
        q.new_full(rows, -torch.inf, dtype=dtype),
        q.new_zeros(rows, dtype=torch.int32),
        q.new_zeros(rows, dtype=dtype),
    )


def forward(inputs: Inputs, solver: Solver, block_size: int) -> Result:
    """The outputs of every query; no gradient is recorded here."""
    result = empty_result(inputs)
    for heads, block, found, only in fits(inputs, solver, block_size):
        _put(result, heads, block, found, only)
    return result


def rescue(
    inputs: Inputs, solver: Solver, block_size: int, result: Result, failed: Tensor
) -> None:
    """Solves the rows that `failed` [B, H, T] says directly in float64, into `result`.

    For forms of any kind: whether a row is solved again depends on nothing but that row.
    """
    for heads, block, found, only in _again(inputs, solver, block_size, failed):
        _put(result, heads, block, found, only)


def _put(
    result: Result, heads: Heads, block: Block, found: Fit, only: Tensor | None
) -> None:
    """The output of a fitted block, and what else there is to tell of it."""
    out, total = heads.weighted_sums(
        block, found.weights, -found.slope, found.at_zero, heads.v, True
    )
    assert total is not None
    out *= _inverse(heads, found.inverse, total)
    rows = (out, found.slope, found.lse, found.iterations, found.residual)
    for target, values in zip(result, rows, strict=True):
        heads.put(target if target.dim() == 4 else target[..., None], block, values, only)


def forward_given(inputs: Inputs, probe: Tensor, block_size: int) -> Result:
    """The same with g given: no mean key is needed, only its product with g."""
    result = empty_result(inputs)
    result.slope.copy_(probe)
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        return result
    space = Workspace(inputs.q, inputs.dtype)
    for heads, block in walk(inputs, block_size, space):
        found = weigh(inputs, heads, block)
        g = torch.where(found.some, heads.rows(probe, block), 0.0)
        products = []
        mean = torch.zeros_like(found.inverse)
        for c0, c1 in block.tiles():
            tile = heads.product(block, g, c0, c1, f"products {c0}")
            heads.blank(block, tile, c0, c1)
            mean += torch.linalg.vecdot(tile, found.weights[:, :, c0:c1])[..., None]
            products.append(tile)
        at_mean = 1 + mean * found.inverse
        total = torch.zeros_like(mean)
        out = g.new_zeros(*g.shape[:2], heads.v.shape[2])
        for (c0, c1), tile in zip(block.tiles(), products, strict=True):
            torch.sub(at_mean, tile, out=tile).mul_(found.weights[:, :, c0:c1])
            total += tile.sum(-1, keepdim=True)
            heads.collect(out, tile, heads.values(block, c0, c1))
        heads.put(result.out, block, out * _inverse(heads, found.inverse, total))
        heads.put(result.lse[..., None], block, found.lse)
    return result


class Weighed(NamedTuple):
    """The softmax weights of one block of queries, rows [n, M, .]."""

    queries: Tensor
    weights: Tensor  # exp(score - max), [n, M, J]
    inverse: Tensor  # 1 / their sum, 0 where no key is seen
    some: Tensor  # whether any is
    lse: Tensor


def weigh(inputs: Inputs, heads: Heads, block: Block) -> Weighed:
    """Scores and their softmax."""
    queries = heads.rows(inputs.q, block)
    scaled = queries * heads.rows(inputs.scale_rows, block)
    weights, total, lse = _softmax(heads, heads.scores(block, scaled))
    lse = lse + (scaled * heads.centre).sum(-1, keepdim=True)
    if inputs.row_bias is not None:
        lse = lse + heads.rows(inputs.row_bias[..., None], block)
    some = total > 0
    inverse = torch.where(some, 1 / total, 0.0)  # applied to sums, not to the M x J weights
    return Weighed(queries, weights, inverse, some, lse)


class Fit(NamedTuple):
    """The solved probe of one block of queries, rows [n, M, .]."""

    weights: Tensor  # exp(score - max), [n, M, J]
    inverse: Tensor  # 1 / their sum, 0 where no key is seen
    mean: Tensor  # kbar - centre
    ridge: Tensor  # effective, relative
    lse: Tensor
    slope: Tensor  # g
    iterations: Tensor
    residual: Tensor
    failed: Tensor
    at_zero: Tensor  # 1 - g . (k - kbar) at k = centre, or - g . k without an intercept


def fits(
    inputs: Inputs, solver: Solver, block_size: int
) -> Iterator[tuple[Heads, Block, Fit, Tensor | None]]:
    """Every block with its fit; then, in float64, the blocks of rows that could not be solved.

    The last item says which rows [n, M, 1] of a fit count, None being all of them. Whether a
    row is solved again depends on nothing but that row.
    """
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        return
    last = solver.direct and inputs.dtype == torch.float64
    space = Workspace(inputs.q, inputs.dtype)
    failed = torch.zeros(inputs.q.shape[:3], dtype=torch.bool, device=inputs.q.device)
    for heads, block in walk(inputs, block_size, space):
        found = fit(inputs, heads, block, solver, last=last)
        heads.put(failed[..., None], block, found.failed)
        yield heads, block, found, None
    if solver.rescues(inputs.dtype) and bool(failed.any()):
        yield from _again(inputs, solver, block_size, failed)


def _again(
    inputs: Inputs, solver: Solver, block_size: int, failed: Tensor
) -> Iterator[tuple[Heads, Block, Fit, Tensor | None]]:
    """The blocks that hold rows of `failed` [B, H, T], fitted directly in float64."""
    wide, solver = replace(inputs, wide=True), replace(solver, direct=True)
    space = Workspace(inputs.q, torch.float64)
    for heads, block in walk(wide, block_size, space):
        only = heads.flags(failed, block)
        if bool(only.any()):
            yield heads, block, fit(wide, heads, block, solver, last=True), only


def fit(
    inputs: Inputs, heads: Heads, block: Block, solver: Solver, *, last: bool = False
) -> Fit:
    """Weights, mean key and g of a block; `last`: g = 0 in rows that fail."""
    queries, weights, inverse, some, lse = weigh(inputs, heads, block)
    mean = heads.mean_key(block, weights) * inverse
    ridge = heads.rows(inputs.ridge_rows, block)
    if inputs.absolute:
        ridge = ridge * torch.exp(-torch.where(some, lse, 0.0))
    right = torch.where(some, mean - (queries - heads.centre), 0.0)
    system = System(heads, block, weights, inverse, mean, ridge, solver.precise)
    (solution,) = system.solve(solver, [right], [None])
    if last:
        solution = solution.final()
    if inputs.covariance_block:
        solution = solution._replace(x=joined(solution.x, right, inputs.covariance_block))
    at_zero = heads.offset(solution.x, mean)
    if solver.precise and heads.intercept:
        at_zero = _balanced(heads, block, weights, inverse, solution.x, at_zero)
    return Fit(weights, inverse, mean, ridge, lse, *solution, at_zero)


def _balanced(
    heads: Heads, block: Block, weights: Tensor, inverse: Tensor, g: Tensor, at_zero: Tensor
) -> Tensor:
    """`at_zero` less what the signed weights then sum to beyond 1: the rounding of g . kbar."""
    total = torch.zeros_like(at_zero)
    for c0, c1 in block.tiles():
        total += heads.weighted(block, weights, -g, at_zero, c0, c1).sum(-1, keepdim=True)
    excess = total * inverse - 1
    return torch.where(excess.abs() < 0.5, at_zero - excess, at_zero)


def signed(heads: Heads, block: Block, found: Fit, c0: int, c1: int) -> Tensor:
    """p (1 - a) of a tile, times the sum of the weights, in scratch memory."""
    return heads.weighted(block, found.weights, -found.slope, found.at_zero, c0, c1)


def _inverse(heads: Heads, inverse: Tensor, total: Tensor) -> Tensor:
    """1 / the sum of the signed weights [n, M, 1], which is that of the weights but for rounding.

    The rounding of a large g would scale every output; this way constants come back exactly.
    Without an intercept the signed weights sum to anything.
    """
    if not heads.intercept:
        return inverse
    close = (total * inverse - 1).abs() < 0.5
    return torch.where(close, 1 / total, inverse)


def _softmax(heads: Heads, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2^(score - max) in place, its sum, and the log-sum-exp; rows without a key: 0, 0, -inf."""
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = heads.exp2_(scores.sub_(top))
    total = weights.sum(-1, keepdim=True)
    return weights, total, top / LOG2E + total.log()
