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

The authors' backward holds lambda times the normaliser constant, which leaves out the last term
of dS (`frozen`). Without an intercept 1 - a_j becomes -g . k_j, and gamma and b are not centred.
Block-diagonal covariances have probes of their own (`diagonal`, `probe`).

An absolute ridge makes lambda_i = lambda exp(-lse_i): its gradient is exp(-lse_i) g . u, and
the rows of dS then sum to -lambda_i g . u instead of 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.local_linear.layout import Block, Inputs, Workspace
from regard.ops.local_linear.probe import Cotangents, Probe
from regard.ops.local_linear.solve import Solver, System
from regard.ops.local_linear.tiles import LOG2E, Heads, walk


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    q: bool
    k: bool
    v: bool
    ridge: bool
    scale: bool
    key_bias: bool
    decay: bool
    row_bias: bool
    probe: bool

    @property
    def solve(self) -> bool:
        """Whether the second solve is needed: for all but v."""
        return self.scores or self.ridge or self.row_bias or self.probe

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
    row: Tensor  # [B, H, T], float64: sum_j dS_ij, 0 with a relative ridge
    probe: Tensor  # [B, H, T, D]


def backward(
    inputs: Inputs,
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    wanted: Wanted,
    solver: Solver,
    block_size: int,
) -> tuple[Tensor, ...]:
    """Gradients in the order of `Wanted`; an empty tensor where none was wanted."""
    sums = no_sums(inputs, wanted)
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        return finish(inputs, sums, wanted)
    saved = (grad, slope, lse)
    failed = torch.zeros(lse.shape, dtype=torch.bool, device=lse.device)
    space = Workspace(inputs.q, inputs.dtype)
    for heads, block in walk(inputs, block_size, space):
        bad = _one_block(inputs, heads, block, saved, sums, wanted, solver, None)
        if bad is not None:
            heads.put(failed[..., None], block, bad)
    if wanted.solve and solver.rescues(inputs.dtype) and bool(failed.any()):
        more = _again(inputs, saved, wanted, solver, block_size, failed)
        for total, extra in zip(sums, more, strict=True):
            total += extra.to(total.dtype)
    return finish(inputs, sums, wanted)


def rescue(
    inputs: Inputs,
    saved: tuple[Tensor, Tensor, Tensor],
    wanted: Wanted,
    solver: Solver,
    block_size: int,
    failed: Tensor,
) -> tuple[Tensor, ...]:
    """What the rows that `failed` [B, H, T] says contribute to the gradients, from float64.

    For forms of any kind, which leave those rows out; `saved` are grad, slope and lse.
    """
    return finish(inputs, _again(inputs, saved, wanted, solver, block_size, failed), wanted)


def _again(
    inputs: Inputs,
    saved: tuple[Tensor, ...],
    wanted: Wanted,
    solver: Solver,
    block_size: int,
    failed: Tensor,
) -> Sums:
    """The contributions of some rows [B, H, T], in float64."""
    wide, solver = replace(inputs, wide=True), replace(solver, direct=True)
    more = no_sums(wide, wanted)
    for heads, block in walk(wide, block_size, Workspace(inputs.q, torch.float64)):
        only = heads.flags(failed, block)
        if bool(only.any()):
            _one_block(wide, heads, block, saved, more, wanted, solver, only)
    return more


def no_sums(inputs: Inputs, wanted: Wanted) -> Sums:
    """Zeros to add to; an empty tensor where nothing is wanted."""
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
        zeros(wanted.decay or wanted.row_bias, rows, torch.float64),
        zeros(wanted.probe, q.shape),
    )


def _one_block(
    inputs: Inputs,
    heads: Heads,
    block: Block,
    saved: tuple[Tensor, ...],
    sums: Sums,
    wanted: Wanted,
    solver: Solver,
    only: Tensor | None,
) -> Tensor | None:
    """Adds a block's contributions, or those of `only` [n, M, 1]; returns which rows failed."""
    grad, slope, lse = saved
    queries = heads.rows(inputs.q, block)
    scale = heads.rows(inputs.scale_rows, block)
    e = heads.rows(grad, block)
    g = heads.rows(slope, block)
    lse = heads.rows(lse[..., None], block)
    # A row that sees no key or has no gradient contributes nothing, whatever its contents.
    live = (e != 0).any(-1, keepdim=True) & (lse != -torch.inf)
    if only is not None:
        live &= only
    queries, g = (torch.where(live, x, 0.0) for x in (queries, g))
    e = torch.where(live, e, 0.0)

    scaled = queries * scale
    shift_of_lse = (scaled * heads.centre).sum(-1, keepdim=True)
    if inputs.row_bias is not None:
        shift_of_lse = shift_of_lse + heads.rows(inputs.row_bias[..., None], block)
    lse_centred = torch.where(live, lse - shift_of_lse, torch.inf)
    weights = heads.exp2_(heads.scores(block, scaled).sub_(lse_centred * LOG2E))
    # The rounding of lse would leave weights that do not sum to 1, and shift every mean.
    total = weights.sum(-1, keepdim=True)
    weights.mul_(torch.where(total > 0, 1 / total, 0.0))
    mean = heads.mean_key(block, weights)
    if not wanted.solve:
        for c0, c1 in block.tiles():
            tile = _factor(heads, block, weights, g, heads.offset(g, mean), c0, c1)
            heads.collect_columns(_columns(heads, block, sums.v, c0, c1), tile, e)
        return None

    evidence = None
    if inputs.absolute:  # exp(-lse), without the rounding of the lse that was saved
        evidence = torch.exp(-torch.where(live, lse, 0.0)) / torch.where(total > 0, total, 1.0)
    ridge = heads.rows(inputs.ridge_rows, block)
    ridge = ridge if evidence is None else ridge * evidence

    shift = torch.where(live, mean - (queries - heads.centre), 0.0)
    gamma, right = _projected_values(heads, block, weights, e)
    failed = None
    if inputs.probe is not None:
        probe = Probe.given(g, right)
    else:
        system = System(heads, block, weights, None, mean, ridge, solver.precise)
        probe = Probe.solve(system, solver, shift, right, g)
    if inputs.probe is None and solver.rescues(inputs.dtype):
        failed = probe.failed
        if bool(failed.any()):  # they contribute later
            weights.masked_fill_(failed, 0.0)
            e, gamma = (x.masked_fill_(failed, 0.0) for x in (e, gamma))
            probe = probe.without(failed)
    row_sum = ridge * probe.agreement
    constant = inputs.absolute or inputs.frozen  # rows of dS sum to -lambda h . u, not to 0
    base = -probe.row if constant else row_sum - probe.row
    cotangents = Cotangents(heads, block, weights, mean, gamma, e, probe, base)

    through = torch.zeros_like(queries)  # sum_j dS_j (k_j - centre)
    for c0, c1 in block.tiles():
        of_k = _columns(heads, block, sums.k, c0, c1) if wanted.k else None
        of_v = _columns(heads, block, sums.v, c0, c1) if wanted.v else None
        tile = cotangents.scores(c0, c1, of_k, of_v, wanted.scores)
        if not wanted.scores:
            continue
        if wanted.q or wanted.scale:
            heads.collect(through, tile, heads.keys(block, c0, c1))
        if wanted.key_bias or wanted.decay:
            batch, count, queries_ = heads.shape(block)
            column = tile.view(batch, count, queries_, -1).sum(2, dtype=torch.float64)
            _per_query_head(heads, sums.column)[..., block.low + c0 : block.low + c1] += column
        if of_k is not None:
            heads.collect_columns(of_k, tile, scaled)

    if constant:  # the scores' row sums reach what the centring had taken off
        through -= row_sum * heads.centre
        if wanted.decay or wanted.row_bias:
            heads.put(sums.row[..., None], block, -row_sum)
    if wanted.q:
        heads.put(sums.q, block, probe.of_query + scale * through)
    if wanted.probe:
        heads.put(sums.probe, block, -right)
    if wanted.ridge:
        slant = probe.agreement if evidence is None else probe.agreement * evidence
        heads.put(sums.ridge[..., None], block, slant)
    if wanted.scale:
        heads.put(sums.scale[..., None], block, (queries * through).sum(-1, keepdim=True))
    return failed


def _projected_values(
    heads: Heads, block: Block, weights: Tensor, e: Tensor
) -> tuple[Tensor, Tensor]:
    """e . v_j less its weighted mean [n, M, J] (zero where hidden), and sum_j p_j of it k_j."""
    gamma = heads.space.take("gamma", *weights.shape)
    mean = e.new_zeros(*e.shape[:2], 1)
    for c0, c1 in block.tiles():
        tile = heads.times(e, heads.values(block, c0, c1), "tile")
        block.blank(tile, heads.shape(block), c0, c1)
        gamma[:, :, c0:c1].copy_(tile)
        mean += tile.mul_(weights[:, :, c0:c1]).sum(-1, keepdim=True)
    if heads.intercept:
        gamma.sub_(mean)
    right = e.new_zeros(*e.shape[:2], heads.k.shape[2])
    for c0, c1 in block.tiles():
        tile = heads.space.take("tile", *e.shape[:2], c1 - c0)
        torch.mul(gamma[:, :, c0:c1], weights[:, :, c0:c1], out=tile)
        heads.collect(right, tile, heads.keys(block, c0, c1))
    return gamma, right


def _factor(
    heads: Heads, block: Block, weights: Tensor, g: Tensor, at_zero: Tensor, c0: int, c1: int
) -> Tensor:
    """p (1 - a) of a tile."""
    return heads.weighted(block, weights, -g, at_zero, c0, c1)


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


def finish(inputs: Inputs, sums: Sums, wanted: Wanted) -> tuple[Tensor, ...]:
    """Sums folded to the shapes and dtypes of the inputs."""
    q, decay = inputs.q, inputs.decay
    nothing = q.new_empty(0)
    bias = sums_of_decay = nothing
    if wanted.key_bias and inputs.key_bias is not None:
        bias = _fold_heads(sums.column, inputs.key_bias).to(inputs.key_bias.dtype)
    if wanted.decay and decay is not None:
        per_head = -sums.column
        if (inputs.absolute or inputs.frozen) and per_head.shape[2]:
            if inputs.causal:
                offset = inputs.visibility.offset
                skipped = max(0, -offset)  # queries before the first key
                at = slice(offset + skipped, None)
                per_head[:, :, at] += sums.row[:, :, skipped:]
            else:
                per_head[:, :, -1] += sums.row.sum(2)
        sums_of_decay = _fold_heads(per_head, decay.sums).to(decay.sums.dtype)
    row_bias = nothing.clone()
    if wanted.row_bias and inputs.row_bias is not None:
        row_bias = sums.row.to(inputs.row_bias.dtype)
    probe = nothing.clone()
    if wanted.probe and inputs.probe is not None:
        probe = sums.probe.to(inputs.probe.dtype)
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
        row_bias,
        probe,
    )


def _fold_heads(total: Tensor, like: Tensor) -> Tensor:
    """[B, H, S] summed to the heads of an operand [B, 1 | Hk | H, S]."""
    B, H, S = total.shape
    return total.view(B, like.shape[1], H // like.shape[1], S).sum(2)
