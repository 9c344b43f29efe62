"""From the importance of blocks to levels: which are attended to, and how finely.

`ends` maps levels to the end of their share, in the order they are walked: of the ranks of a row
(`topk`) or of its cumulative importance (`thresholdbound`, `energybound`). Level 0 gets the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LISTED = (1, 2, 4, 8, 0)  # the order of levels in the released list format


def topk_levels(
    importance: Tensor, ends: Mapping[int, float], *, block_k: int, tile: int | None, least: int
) -> Tensor:
    """Ranks [start, end) of a row get a level: end = int(n share), start the end before.

    importance [B, H, nq, nk] -> int8 levels. With a `tile`, a level whose pooled blocks are
    narrower than a tile of the released kernels gets a multiple of the blocks that fill one.
    `least`: blocks that the first level has at least.
    """
    n = importance.shape[3]
    of_rank = torch.zeros(n, dtype=torch.int8, device=importance.device)
    start = 0
    for level, share in ends.items():
        end = min(n, int(n * share))
        if level == 1:
            end = max(end, min(n, least))
        unit = _unit(level, block_k, tile)
        if unit > 1 and end > start:
            end = min(n, start + -(-(end - start) // unit) * unit)
            if end == n:
                end = start + (end - start) // unit * unit
        end = max(start, end)
        of_rank[start:end] = level
        start = end
    return _at_blocks(of_rank.expand(importance.shape), importance)


def threshold_levels(
    importance: Tensor, ends: Mapping[int, float], *, block_k: int, tile: int | None
) -> Tensor:
    """Blocks up to, and with, the one that crosses a share of the importance get a level.

    importance [B, H, nq, nk] -> int8 levels. The first level has at least 6 % of the blocks,
    and one. `tile` as in `topk_levels`.
    """
    n = importance.shape[3]
    mass = _cumulative(importance)
    rank = torch.arange(n, device=importance.device)
    of_rank = torch.zeros(importance.shape, dtype=torch.int8, device=importance.device)
    before = torch.zeros_like(mass[..., :1], dtype=torch.int64)
    for level, share in sorted(ends.items(), key=lambda item: item[1]):
        count = (mass <= share + 1e-6).sum(3, keepdim=True)
        end = torch.where(count > 0, count + 1, before)
        unit = _unit(level, block_k, tile)
        if unit > 1:
            length = (end - before).clamp(min=0)
            end = (before + (length + unit - 1) // unit * unit).clamp(max=n)
            end = torch.where(end == n, before + (end - before) // unit * unit, end)
        else:
            end = torch.maximum(end, before).clamp(max=n)
            if level == 1:
                end = end.clamp(min=min(n, int(0.06 * n) + 1))
        of_rank.masked_fill_((rank >= before) & (rank < end), level)
        before = end
    return _at_blocks(of_rank, importance)


def counted_levels(
    importance: Tensor, ends: Mapping[int, float], counts: Tensor, *, least: int
) -> Tensor:
    """`topk_levels` without tiles, where row i has counts[i] blocks to rank, int64 [nq]."""
    rank = torch.arange(importance.shape[3], device=importance.device)
    of_rank = torch.zeros(importance.shape[2:], dtype=torch.int8, device=importance.device)
    start = torch.zeros_like(counts)
    for level, share in ends.items():
        # In float64, as Python's int(count * share) of the released code.
        end = (counts.double() * share).long()
        if level == 1:
            end = torch.maximum(end, counts.clamp(max=least))
        end = torch.maximum(start, end)
        of_rank.masked_fill_((rank >= start[:, None]) & (rank < end[:, None]), level)
        start = end
    return _at_blocks(of_rank.expand(importance.shape), importance)


def energy_levels(importance: Tensor, ends: Mapping[int, float], *, crossing: str) -> Tensor:
    """A block gets the level in whose share of the cumulative importance it lies.

    importance [B, H, nq, nk] -> int8 levels. The block that crosses an end belongs to the
    "finer" level, so that a dominant block is never coarse; the released code gives it to the
    "coarser" one.
    """
    mass = _cumulative(importance, least=1e-10)
    if crossing == "finer":
        mass = torch.cat([torch.zeros_like(mass[..., :1]), mass[..., :-1]], 3)
    of_rank = torch.zeros(importance.shape, dtype=torch.int8, device=importance.device)
    lower = 0.0
    for level, share in ends.items():
        if crossing == "finer":
            inside = (mass >= lower) & (mass < share)
        else:
            inside = (mass > lower) & (mass <= share)
        of_rank.masked_fill_(inside, level)
        lower = max(lower, share)
    return _at_blocks(of_rank, importance)


def encode_levels(levels: Tensor, importance: Tensor) -> Tensor:
    """The released list format: int32 [B, H, nq, nk + 5].

    For each of the levels 1, 2, 4, 8, 0 its blocks in falling importance, then -1.
    """
    n = levels.shape[3]
    order = importance.sort(dim=3, descending=True, stable=True).indices
    ranked = levels.gather(3, order)
    place = torch.zeros_like(ranked, dtype=torch.int64)
    for turn, level in enumerate(LISTED):
        place.masked_fill_(ranked == level, turn)
    turn_of, by_level = place.sort(dim=3, stable=True)
    lists = torch.full((*levels.shape[:3], n + 5), -1, dtype=torch.int32, device=levels.device)
    position = torch.arange(n, device=levels.device) + turn_of  # a separator per level before
    return lists.scatter_(3, position, order.gather(3, by_level).int())


def decode_levels(lists: Tensor) -> Tensor:
    """int8 levels [B, H, nq, nk] from the released list format [B, H, nq, nk + 5].

    ValueError if a row is not five lists that name every block once.
    """
    n = lists.shape[3] - 5
    ends = lists == -1
    blocks = lists.masked_select(~ends)
    if n < 0 or not bool((ends.sum(3) == 5).all()) or not bool(ends[..., -1].all()):
        raise ValueError("decode_levels: every row needs five lists that end in -1")
    named = blocks.view(*lists.shape[:3], n).long()
    everything = torch.arange(n, device=lists.device)
    if not torch.equal(named.sort(3).values, everything.expand(named.shape)):
        raise ValueError("decode_levels: every row must name every block once")
    turn = ends.cumsum(3).masked_select(~ends).view(named.shape)
    values = torch.tensor(LISTED, dtype=torch.int8, device=lists.device)[turn]
    return torch.zeros_like(values).scatter_(3, named, values)


def _unit(level: int, block_k: int, tile: int | None) -> int:
    if level == 0 or tile is None:
        return 1
    return -(-level // max(1, block_k // tile))


def _cumulative(importance: Tensor, least: float = 0.0) -> Tensor:
    """The share of a row's importance in its blocks up to each rank."""
    ranked = importance.sort(dim=3, descending=True, stable=True).values
    total = ranked.sum(3, keepdim=True).clamp(min=least)
    return ranked.cumsum(3) / torch.where(total == 0, 1.0, total)


def _at_blocks(of_rank: Tensor, importance: Tensor) -> Tensor:
    order = importance.sort(dim=3, descending=True, stable=True).indices
    return torch.zeros_like(order, dtype=torch.int8).scatter_(3, order, of_rank)
