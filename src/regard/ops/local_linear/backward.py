"""The exact gradient, block by block: the weights again, one more solve with the same matrix.

The probe g of the forward is first refined to the tolerance of the backward: the formulas below
hold for the exact g, and the error of a rough one would be multiplied by the slope of the fit.

With e the gradient of an output, gamma_j = e . v_j centred by its weighted mean, and
u = (C + lambda I)^-1 sum_j p_j gamma_j k_j,  a_j = g . (k_j - kbar),  b_j = u . (k_j - kbar):

    dS_j = p_j ((1 - a_j)(gamma_j - b_j) + lambda g . u)      (no last term: absolute ridge)
    dq   = u + scale sum_j dS_j k_j
    dk_j = sum_i scale dS_ij q_i - p_ij (gamma_ij - b_ij) g_i - p_ij (1 - a_ij) u_i
    dv_j = sum_i p_ij (1 - a_ij) e_i
    dlambda = g . u      dscale = sum_ij dS_ij q_i . k_j      dbias_j = sum_i dS_ij

An absolute ridge makes lambda_i = lambda exp(-lse_i): its gradient is exp(-lse_i) g . u, and
the rows of dS then sum to -lambda_i g . u instead of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.local_linear.cg import conjugate_gradient
from regard.ops.local_linear.tiles import Block, Heads, Inputs, Workspace, walk


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    q: bool
    k: bool
    v: bool
    ridge: bool
    scale: bool
    key_bias: bool
    decay: bool

    @property
    def solve(self) -> bool:
        """Whether the second solve is needed: for all but v."""
        return self.q or self.k or self.ridge or self.scale or self.key_bias or self.decay

    @property
    def scores(self) -> bool:
        """Whether the gradient of the scores is needed."""
        return self.q or self.k or self.scale or self.key_bias or self.decay


class Sums(NamedTuple):
    """Gradients under construction, on the heads they are summed over."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, Hk, S, D]
    v: Tensor  # [B, Hk, S, Dv]
    ridge: Tensor  # [B, H, T]
    scale: Tensor  # [B, H, T]
    column: Tensor  # [B, H, S], float64: sum_i dS_ij
    row: Tensor  # [B, H, T], float64: sum_j dS_ij


def backward(
    inputs: Inputs,
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    wanted: Wanted,
    tol: float,
    max_iters: int,
    block_size: int,
) -> tuple[Tensor, ...]:
    """Gradients in the order of `Wanted`; an empty tensor where none was wanted."""
    sums = _zeros(inputs, wanted)
    if inputs.q.numel() and inputs.k.shape[2]:
        space = Workspace(inputs.q, inputs.dtype)
        saved = (grad, slope, lse)
        for heads, block in walk(inputs, block_size, space):
            _one_block(inputs, heads, block, saved, sums, wanted, tol, max_iters)
    return _finish(inputs, sums, wanted)


def _zeros(inputs: Inputs, wanted: Wanted) -> Sums:
    q, k, v, dtype = inputs.q, inputs.k, inputs.v, inputs.dtype
    rows, columns = q.shape[:3], (*q.shape[:2], k.shape[2])

    def zeros(needed: bool, shape: tuple[int, ...], kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape if needed else (0,), dtype=kind, device=q.device)

    return Sums(
        zeros(wanted.q, q.shape),
        zeros(wanted.k, k.shape),
        zeros(wanted.v, v.shape),
        zeros(wanted.ridge, rows),
        zeros(wanted.scale, rows),
        zeros(wanted.key_bias or wanted.decay, columns, torch.float64),
        zeros(wanted.decay and inputs.absolute, rows, torch.float64),
    )


def _one_block(
    inputs: Inputs,
    heads: Heads,
    block: Block,
    saved: tuple[Tensor, ...],
    sums: Sums,
    wanted: Wanted,
    tol: float,
    max_iters: int,
) -> None:
    grad, slope, lse = saved
    queries = heads.rows(inputs.q, block)
    scale = heads.rows(inputs.scale_rows, block)
    e = heads.rows(grad, block)
    g = heads.rows(slope, block)
    lse = heads.rows(lse[..., None], block)
    # A row that sees no key or has no gradient contributes nothing, whatever its contents.
    live = (e != 0).any(-1, keepdim=True) & (lse != -torch.inf)
    queries, g = (torch.where(live, x, 0.0) for x in (queries, g))
    e = torch.where(live, e, 0.0)

    scaled = queries * scale
    lse_centred = torch.where(live, lse - (scaled * heads.centre).sum(-1, keepdim=True), torch.inf)
    weights = heads.scores(block, scaled).sub_(lse_centred).exp_()
    # The rounding of lse would leave weights that do not sum to 1, and shift every mean.
    total = weights.sum(-1, keepdim=True)
    weights.mul_(torch.where(total > 0, 1 / total, 0.0))
    mean = heads.mean_key(block, weights)
    if not wanted.solve:
        g_mean = (g * mean).sum(-1, keepdim=True)
        for c0, c1 in block.tiles():
            tile = _factor(heads, block, weights, g, 1 + g_mean, c0, c1)
            _columns(heads, block, sums.v, c0, c1).baddbmm_(tile.mT, e)
        return

    evidence = torch.exp(-torch.where(live, lse, 0.0)) if inputs.absolute else None
    ridge = heads.rows(inputs.ridge_rows, block)
    ridge = ridge if evidence is None else ridge * evidence

    def matrix(x: Tensor) -> Tensor:
        return heads.covariance(block, weights, mean, x) + ridge * x

    shift = torch.where(live, mean - (queries - heads.centre), 0.0)
    g, _, _ = conjugate_gradient(matrix, shift, tol, max_iters, g)
    gamma, right = _projected_values(heads, block, weights, e)
    u, _, _ = conjugate_gradient(matrix, right, tol, max_iters)
    g_mean, u_mean, agreement = ((x * y).sum(-1, True) for x, y in ((g, mean), (u, mean), (g, u)))
    gamma.add_(u_mean)
    row_sum = ridge * agreement  # lambda g . u

    through = torch.zeros_like(queries)  # sum_j dS_j (k_j - centre)
    for c0, c1 in block.tiles():
        keys, w = heads.keys(block, c0, c1), weights[:, :, c0:c1]
        rest = gamma[:, :, c0:c1].baddbmm_(u, keys.mT, alpha=-1)  # gamma - b
        block.blank(rest, heads.shape(block), c0, c1)
        tile = _factor(heads, block, weights, g, 1 + g_mean, c0, c1)  # p (1 - a)
        if wanted.v:
            _columns(heads, block, sums.v, c0, c1).baddbmm_(tile.mT, e)
        if wanted.k:
            _columns(heads, block, sums.k, c0, c1).baddbmm_(tile.mT, u, alpha=-1)
        if not wanted.scores:
            continue
        tile.mul_(rest)
        if not inputs.absolute:
            tile.addcmul_(w, row_sum)
        if wanted.q or wanted.scale:
            through.baddbmm_(tile, keys)
        if wanted.key_bias or wanted.decay:
            batch, count, queries_ = heads.shape(block)
            column = tile.view(batch, count, queries_, -1).sum(2, dtype=torch.float64)
            _per_query_head(heads, sums.column)[..., block.low + c0 : block.low + c1] += column
        if wanted.k:
            into = _columns(heads, block, sums.k, c0, c1)
            into.baddbmm_(tile.mT, scaled)
            into.baddbmm_(rest.mul_(w).mT, g, alpha=-1)

    if inputs.absolute:  # the scores' row sums reach what the centring had taken off
        through -= row_sum * heads.centre
        if wanted.decay:
            heads.put(sums.row[..., None], block, -row_sum)
    if wanted.q:
        heads.put(sums.q, block, u + scale * through)
    if wanted.ridge:
        slant = agreement if evidence is None else agreement * evidence
        heads.put(sums.ridge[..., None], block, slant)
    if wanted.scale:
        heads.put(sums.scale[..., None], block, (queries * through).sum(-1, keepdim=True))


def _projected_values(
    heads: Heads, block: Block, weights: Tensor, e: Tensor
) -> tuple[Tensor, Tensor]:
    """e . v_j less its weighted mean [n, M, J] (zero where hidden), and sum_j p_j of it k_j."""
    gamma = heads.space.take("gamma", *weights.shape)
    mean = e.new_zeros(*e.shape[:2], 1)
    for c0, c1 in block.tiles():
        tile = heads.space.take("tile", *e.shape[:2], c1 - c0)
        torch.bmm(e, heads.values(block, c0, c1).mT, out=tile)
        block.blank(tile, heads.shape(block), c0, c1)
        gamma[:, :, c0:c1].copy_(tile)
        mean += tile.mul_(weights[:, :, c0:c1]).sum(-1, keepdim=True)
    gamma.sub_(mean)
    right = e.new_zeros(*e.shape[:2], heads.k.shape[2])
    for c0, c1 in block.tiles():
        tile = heads.space.take("tile", *e.shape[:2], c1 - c0)
        torch.mul(gamma[:, :, c0:c1], weights[:, :, c0:c1], out=tile)
        right.baddbmm_(tile, heads.keys(block, c0, c1))
    return gamma, right


def _factor(
    heads: Heads, block: Block, weights: Tensor, g: Tensor, at_mean: Tensor, c0: int, c1: int
) -> Tensor:
    """p (1 - a) of a tile."""
    tile = heads.product(block, g, c0, c1)
    torch.sub(at_mean, tile, out=tile).mul_(weights[:, :, c0:c1])
    block.blank(tile, heads.shape(block), c0, c1)
    return tile


def _columns(heads: Heads, block: Block, total: Tensor, c0: int, c1: int) -> Tensor:
    """The place of a tile's keys in a gradient [B, Hk, S, X], as [n, keys, X]."""
    b0, b1, h0, h1 = heads.part
    return total.flatten(0, 1)[
        b0 * total.shape[1] + h0 : (b1 - 1) * total.shape[1] + h1,
        block.low + c0 : block.low + c1,
    ]


def _per_query_head(heads: Heads, total: Tensor) -> Tensor:
    b0, b1, h0, h1 = heads.part
    return total[b0:b1, h0 * heads.group : h1 * heads.group]


def _finish(inputs: Inputs, sums: Sums, wanted: Wanted) -> tuple[Tensor, ...]:
    """Sums folded to the shapes and dtypes of the inputs."""
    q, decay = inputs.q, inputs.decay
    nothing = q.new_empty(0)
    bias = sums_of_decay = nothing
    if wanted.key_bias and inputs.key_bias is not None:
        bias = _fold_heads(sums.column, inputs.key_bias).to(inputs.key_bias.dtype)
    if wanted.decay and decay is not None:
        per_head = -sums.column
        # With a relative ridge the rows of dS sum to zero.
        if inputs.absolute and per_head.shape[2]:
            if inputs.causal:
                offset = inputs.visibility.offset
                skipped = max(0, -offset)  # queries before the first key
                at = slice(offset + skipped, None)
                per_head[:, :, at] += sums.row[:, :, skipped:]
            else:
                per_head[:, :, -1] += sums.row.sum(2)
        sums_of_decay = _fold_heads(per_head, decay.sums).to(decay.sums.dtype)
    ridge = sums.ridge.double().sum_to_size(inputs.ridge.shape) if wanted.ridge else nothing
    scale = sums.scale.double().sum(2).sum_to_size(inputs.scale.shape) if wanted.scale else nothing
    return (
        sums.q.to(q.dtype) if wanted.q else nothing,
        sums.k.to(inputs.k.dtype) if wanted.k else nothing.clone(),
        sums.v.to(inputs.v.dtype) if wanted.v else nothing.clone(),
        ridge.to(inputs.ridge.dtype) if wanted.ridge else nothing.clone(),
        scale.to(inputs.scale.dtype) if wanted.scale else nothing.clone(),
        bias if wanted.key_bias else nothing.clone(),
        sums_of_decay if wanted.decay else nothing.clone(),
    )


def _fold_heads(total: Tensor, like: Tensor) -> Tensor:
    """[B, H, S] summed to the heads of an operand [B, 1 | Hk | H, S]."""
    B, H, S = total.shape
    return total.view(B, like.shape[1], H // like.shape[1], S).sum(2)
