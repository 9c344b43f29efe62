"""The forward, block by block: weights, mean key, conjugate gradients, output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.local_linear.cg import conjugate_gradient
from regard.ops.local_linear.tiles import Block, Heads, Inputs, Workspace, walk


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


def forward(inputs: Inputs, tol: float, max_iters: int, block_size: int) -> Result:
    """The outputs of every query; no gradient is recorded here."""
    result = empty_result(inputs)
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        return result
    space = Workspace(inputs.q, inputs.dtype)
    for heads, block in walk(inputs, block_size, space):
        for target, rows in zip(
            result, _one_block(inputs, heads, block, tol, max_iters), strict=True
        ):
            heads.put(target if target.dim() == 4 else target[..., None], block, rows)
    return result


class Fit(NamedTuple):
    """The solved probe of one block of queries, rows [n, M, .]."""

    weights: Tensor  # exp(score - max), [n, M, J]
    inverse: Tensor  # 1 / their sum, 0 where no key is seen
    mean: Tensor  # kbar - centre
    ridge: Tensor  # effective, relative
    slope: Tensor  # g
    lse: Tensor
    iterations: Tensor
    residual: Tensor


def fit(inputs: Inputs, heads: Heads, block: Block, tol: float, max_iters: int) -> Fit:
    """Weights, mean key and g of a block."""
    queries = heads.rows(inputs.q, block)
    scaled = queries * heads.rows(inputs.scale_rows, block)
    weights, total, lse_centred = _softmax(heads.scores(block, scaled))
    some = total > 0
    inverse = torch.where(some, 1 / total, 0.0)  # applied to sums, not to the M x J weights
    mean = heads.mean_key(block, weights) * inverse
    lse = lse_centred + (scaled * heads.centre).sum(-1, keepdim=True)
    ridge = heads.rows(inputs.ridge_rows, block)
    if inputs.absolute:
        ridge = ridge * torch.exp(-torch.where(some, lse, 0.0))

    def matrix(x: Tensor) -> Tensor:
        return heads.covariance(block, weights, mean, x) * inverse + ridge * x

    right = torch.where(some, mean - (queries - heads.centre), 0.0)
    slope, iterations, residual = conjugate_gradient(matrix, right, tol, max_iters)
    return Fit(weights, inverse, mean, ridge, slope, lse, iterations, residual)


def signed(heads: Heads, block: Block, found: Fit, c0: int, c1: int) -> Tensor:
    """p (1 - a) of a tile, times the sum of the weights, in scratch memory."""
    at_mean = 1 + (found.slope * found.mean).sum(-1, keepdim=True)
    tile = heads.product(block, found.slope, c0, c1)
    torch.sub(at_mean, tile, out=tile).mul_(found.weights[:, :, c0:c1])
    block.blank(tile, heads.shape(block), c0, c1)
    return tile


def _one_block(
    inputs: Inputs, heads: Heads, block: Block, tol: float, max_iters: int
) -> tuple[Tensor, ...]:
    found = fit(inputs, heads, block, tol, max_iters)
    out = found.slope.new_zeros(*found.slope.shape[:2], heads.v.shape[2])
    for c0, c1 in block.tiles():
        out.baddbmm_(signed(heads, block, found, c0, c1), heads.values(block, c0, c1))
    return out * found.inverse, found.slope, found.lse, found.iterations, found.residual


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(score - max) in place, its sum, and the log-sum-exp; rows without a key: 0, 0, -inf."""
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights, total, top + total.log()
