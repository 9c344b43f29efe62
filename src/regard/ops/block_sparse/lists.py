"""From a plan to lists of rows: which rows of the pyramid each block of queries attends to.

A plan is either a map of levels [Bp, Hp, nq, nk] or indices of key blocks [Bp, Hp, nq, n]. Both
become segments of consecutive rows, in the order of their tokens, one list for each head of the
plan and block of queries: what position hides from all queries of the block is left out already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.block_sparse.pyramid import Layout


class Reach(NamedTuple):
    """Which tokens a query sees by position: query i stands at key position i + offset.

    left, right: how many tokens before and behind its own; -1 is without bound.
    """

    T: int
    S: int
    left: int = -1
    right: int = -1

    @property
    def offset(self) -> int:
        """Where the first query stands among the keys."""
        return self.S - self.T


class Lists(NamedTuple):
    """Segment n is rows [start, start + length); list p nq + i has segments [offset, next offset).

    clear: whether every query of the block sees every row of the segment.
    """

    offsets: Tensor
    start: Tensor
    length: Tensor
    clear: Tensor


def check_levels(levels: Tensor, layout: Layout) -> None:
    """ValueError for a level that blocks do not have."""
    known = torch.zeros(9, dtype=torch.bool)
    known[[0, *layout.levels]] = True
    if levels.numel() and not bool(
        (levels >= 0).all() and (levels <= 8).all() and known.to(levels.device)[levels.long()].all()
    ):
        found = sorted(set(levels.unique().tolist()) - {0, *layout.levels})
        allowed = ", ".join(map(str, (0, *layout.levels)))
        raise ValueError(
            f"block_sparse_attention: levels must be in {{{allowed}}} with blocks of "
            f"{layout.block} keys, got {', '.join(map(str, found[:5]))}"
        )


def check_blocks(selected: Tensor, layout: Layout) -> None:
    """ValueError for an index that is of no block."""
    if selected.numel() and not bool(
        (selected >= -1).all() and (selected < max(layout.blocks, 1)).all()
    ):
        raise ValueError(
            f"selected_attention: selected must be in [-1, {layout.blocks}), got values from "
            f"{int(selected.min())} to {int(selected.max())}"
        )


def from_levels(levels: Tensor, block_q: int, layout: Layout, reach: Reach) -> Lists:
    """Lists of a map of levels, integers."""
    check_levels(levels, layout)
    nq = levels.shape[2]
    rows = levels.flatten(0, 1)
    head, block, key = rows.nonzero(as_tuple=True)
    return _segments(head * nq + block, key, rows[head, block, key].long(),
                     rows.shape[0] * nq, nq, block_q, layout, reach)  # fmt: skip


def from_blocks(selected: Tensor, block_q: int, layout: Layout, reach: Reach) -> Lists:
    """Lists of indices of key blocks; -1 is none, and what is named twice counts once."""
    check_blocks(selected, layout)
    nq = selected.shape[2]
    ordered = selected.flatten(0, 1).long().sort(-1).values
    new = ordered >= 0
    new[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
    head, block, place = new.nonzero(as_tuple=True)
    key = ordered[head, block, place]
    return _segments(head * nq + block, key, torch.ones_like(key),
                     ordered.shape[0] * nq, nq, block_q, layout, reach)  # fmt: skip


def _segments(
    row: Tensor, key: Tensor, level: Tensor, count: int, nq: int,
    block_q: int, layout: Layout, reach: Reach,
) -> Lists:  # fmt: skip
    device = row.device
    tables = torch.zeros(2, 9, dtype=torch.long, device=device)
    for known in layout.levels:
        tables[0, known], tables[1, known] = layout.start(known), layout.count(known)
    starts, counts = tables[0][level], tables[1][level]
    first_token, per_block = key * layout.block, layout.block // level.clamp(min=1)
    length = torch.minimum(per_block, counts - key * per_block)
    low = (row % max(nq, 1)) * block_q + reach.offset  # positions of the first and last query
    high = torch.clamp((row % max(nq, 1) + 1) * block_q, max=reach.T) - 1 + reach.offset
    skip, clear = torch.zeros_like(length), torch.ones_like(length, dtype=torch.bool)
    if reach.right >= 0:
        length, whole = (
            _until(position + reach.right, first_token, level, length, layout)
            for position in (high, low)
        )
        clear &= whole >= length
    if reach.left >= 0:
        skip = (-((first_token - low + reach.left) // level)).clamp(min=0)
        clear &= first_token + skip * level >= high - reach.left
    kept = length > skip
    row, level, clear = row[kept], level[kept], clear[kept]
    start = (starts + key * per_block + skip)[kept]
    offsets = torch.zeros(count + 1, dtype=torch.long, device=device)
    offsets[1:] = torch.bincount(row, minlength=count).cumsum(0)
    return Lists(offsets, start, (length - skip)[kept], clear)


def _until(limit: Tensor, first: Tensor, level: Tensor, length: Tensor, layout: Layout) -> Tensor:
    """How many rows of a segment end at token `limit` or before."""
    whole = ((limit + 1 - first) // level).clamp(min=0)
    if not layout.replicate:  # the last group ends with the last key
        whole = torch.where(limit >= layout.S - 1, length, whole)
    return torch.minimum(whole, length)
