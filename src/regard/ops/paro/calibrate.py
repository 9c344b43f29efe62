"""Calibration: orders and static masks from a few runs' queries and keys."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from regard.core.checks import check_integer, check_number, reject, words
from regard.ops.paro.metrics import BlockStatistics, choose_order, statistics_of
from regard.ops.paro.orders import check_grid
from regard.ops.paro.plan import ParoPlan

Sample = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]


def calibrate_paro(
    samples: Iterable[Sample],
    grid: tuple[int, ...],
    *,
    text: int = 0,
    block: int = 64,
    density: float = 0.3,
    eps: float = 0.02,
    alpha: float = 0.5,
    buckets: int = 1,
    scale: float | None = None,
    code: int | None = None,
) -> ParoPlan:
    """Chooses each head's order of the axes and the blocks that it keeps.

        code_h = argmax_c score_c (see `choose_order`),   kept = the blocks of largest mass

    Args:
        samples: (q, k) or (q, k, bucket) of one layer, [B, H, L, D] and [B, Hk, L, D] in raster
            order, after rotary embedding and normalisation; seen once.
        grid, text: L = text + cells, text in front.
        density: blocks that are kept, of all. Those with text, on the diagonal and at a ragged
            end are always kept, whatever the density, and count.
        eps, alpha: of the scores.
        buckets: masks are averaged within a bucket of steps; orders over all samples.
        code: the order of all heads instead of a choice: 0 is the raster.

    Precision: maps in float32, sums in float64.
    Cost: O(codes L^2 D) time per sample; O(codes (L / block)^2) memory per head.
    Source: PAROAttention, arXiv 2506.16054; its calibration is not published: orders follow the
    two measures that the paper combines. The maximum of a block is averaged over samples.
    Raises: TypeError, ValueError naming the argument.

    >>> q = torch.randn(1, 2, 64, 8)
    >>> calibrate_paro([(q, q)], (4, 4, 4), block=16, density=0.5).masks.shape
    torch.Size([1, 2, 4, 4])
    """
    op = "calibrate_paro"
    check_grid(op, grid, text)
    for name, size in (("block", block), ("buckets", buckets)):
        check_integer(op, name, size)
    check_number(op, "density", density, above=0.0)
    check_number(op, "eps", eps, least=0.0)
    check_number(op, "alpha", alpha, least=0.0)
    length = text + math.prod(grid)
    if block > math.prod(grid):
        raise reject(op, "block", f"at most the {math.prod(grid)} cells of the grid", block)
    total: BlockStatistics | None = None
    masses: list[Tensor | None] = [None] * buckets
    counts = [0] * buckets
    for sample in samples:
        q, k, *rest = sample
        bucket = int(rest[0]) if rest else 0
        if q.shape[2] != length or k.shape[2] != length:
            raise reject(op, "samples", f"of {length} tokens", words(f"{q.shape[2]} tokens"))
        if not 0 <= bucket < buckets:
            raise reject(op, "samples", f"of buckets in [0, {buckets})", bucket)
        found = statistics_of(q.detach(), k.detach(), grid, block, text, scale)
        total = found if total is None else BlockStatistics(*map(torch.add, total, found))
        before = masses[bucket]
        masses[bucket] = found.whole if before is None else before + found.whole
        counts[bucket] += 1
    if total is None:
        raise reject(op, "samples", "at least one pair of queries and keys", words("none"))
    empty = [bucket for bucket, mass in enumerate(masses) if mass is None]
    if empty:
        raise reject(op, "samples", "at least one per bucket", words(f"none of buckets {empty}"))
    mean = BlockStatistics(*(x / sum(counts) for x in total))
    codes = choose_order(mean, block, eps=eps, alpha=alpha).code
    if code is not None:
        if code not in range(mean.whole.shape[1]):
            raise reject(op, "code", f"in [0, {mean.whole.shape[1]})", code)
        codes = torch.full_like(codes, code)
    heads = torch.arange(len(codes), device=codes.device)
    forced = forced_blocks(length, block, text).to(codes.device)
    masks = [keep(mass[heads, codes], density, forced) for mass in masses if mass is not None]
    return ParoPlan(codes, torch.stack(masks), grid, text, block)


def forced_blocks(length: int, block: int, text: int = 0) -> Tensor:
    """bool [n, n]: the diagonal, rows and columns with text, and those of a ragged end."""
    n = -(-length // block)
    forced = torch.eye(n, dtype=torch.bool)
    words_end = -(-text // block)
    forced[:words_end] = True
    forced[:, :words_end] = True
    if length % block:
        forced[-1] = True
        forced[:, -1] = True
    return forced


def keep(mass: Float[Tensor, "h n n"], density: float, forced: Tensor | None = None) -> Tensor:
    """bool [h, n, n]: the blocks of largest mass, round(density n^2) with the forced ones."""
    mass = mass.flatten(1)
    if forced is not None:
        mass = mass.masked_fill(forced.flatten(), torch.inf)
    n = mass.shape[1]
    least = 0 if forced is None else int(forced.sum())
    count = min(n, max(least, round(density * n)))
    ranked = mass.sort(dim=1, descending=True, stable=True).indices[:, :count]
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, ranked, True)
    side = math.isqrt(n)
    return kept.view(-1, side, side)
