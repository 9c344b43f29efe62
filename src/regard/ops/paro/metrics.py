"""How blockwise a head's attention is in an order of the axes, from sums and maxima of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.paro.orders import axis_orders


class BlockStatistics(NamedTuple):
    """Of every head and code: what the blocks of its attention map hold, each [H, codes, n, n].

    sums, peaks: sum and maximum of a block of the grid's tokens alone; a ragged end is left out.
    whole: sums of the blocks of the whole sequence, text in front and the ragged end included.
    """

    sums: Tensor
    peaks: Tensor
    whole: Tensor


class Choice(NamedTuple):
    """Sparsity M1, incoherence M2 and score M3, each [H, codes] float64, and the code [H]."""

    sparsity: Tensor
    incoherence: Tensor
    score: Tensor
    code: Tensor


def statistics_of_map(
    attention: Tensor, grid: tuple[int, ...], block: int, text: int = 0
) -> BlockStatistics:
    """From attention maps [H, L, L] (rows sum to 1)."""
    tiles = lambda h, order, rows: attention[h][rows][:, order].double()  # noqa: E731
    return _collect(tiles, attention.shape[0], grid, block, text, attention)


def statistics_of(
    q: Tensor, k: Tensor, grid: tuple[int, ...], block: int, text: int = 0,
    scale: float | None = None,
) -> BlockStatistics:  # fmt: skip
    """From queries and keys [B, H, L, D]; the mean over B of the sums, and of the maxima.

    A tile of `block` rows of the map is held at a time.
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = []
    for b in range(q.shape[0]):

        def tiles(h: int, order: Tensor, rows: Tensor, b: int = b) -> Tensor:
            return torch.softmax(q[b, h, rows].float() @ k[b, h, order].float().mT * factor, 1)

        found.append(_collect(tiles, q.shape[1], grid, block, text, q))
    return BlockStatistics(*(torch.stack(parts).mean(0) for parts in zip(*found, strict=True)))


def _collect(
    tiles: object, heads: int, grid: tuple[int, ...], block: int, text: int, like: Tensor
) -> BlockStatistics:
    orders = axis_orders(grid, text).to(like.device)
    codes, length = orders.shape
    inner, outer = (length - text) // block, -(-length // block)
    shape = heads, codes, inner, inner
    sums = like.new_zeros(shape, dtype=torch.float64)
    peaks = like.new_zeros(shape, dtype=torch.float64)
    whole = like.new_zeros(heads, codes, outer, outer, dtype=torch.float64)
    for h, code, start in _walk(heads, codes, length, block):
        order = orders[code]
        tile = tiles(h, order, order[start : start + block])  # pyright: ignore[reportCallIssue]
        padded = torch.nn.functional.pad(tile, (0, outer * block - length))
        whole[h, code, start // block] = padded.unflatten(1, (outer, block)).sum((0, 2)).double()
        # A tile of the whole sequence lies across one or two blocks of the grid's tokens.
        row = torch.arange(start, start + tile.shape[0], device=like.device) - text
        columns = tile[:, text : text + inner * block].unflatten(1, (inner, block))
        for own in row.div(block, rounding_mode="floor").unique().tolist():
            if 0 <= own < inner:
                part = columns[row.div(block, rounding_mode="floor") == own]
                sums[h, code, own] += part.sum((0, 2)).double()
                best = part.amax((0, 2)).double()
                peaks[h, code, own] = torch.maximum(peaks[h, code, own], best)
    return BlockStatistics(sums, peaks, whole)


def _walk(heads: int, codes: int, length: int, block: int) -> Iterator[tuple[int, int, int]]:
    for h in range(heads):
        for code in range(codes):
            for start in range(0, length, block):
                yield h, code, start


def choose_order(
    found: BlockStatistics, block: int, *, eps: float = 0.02, alpha: float = 0.5
) -> Choice:
    """The order in which a head's map has most empty blocks and the most even other ones.

        M1 S_c = share of blocks with sum < eps block
        M2 Q_c = mean over blocks of max / mean
        M3 score_c = alpha S_c / sum_c' S_c' + (1 - alpha) (1 - Q_c / sum_c' Q_c')

    An empty map (a block of zeros) has max / mean 1. Among equal scores the first code wins.
    """
    sparsity = (found.sums < eps * block).double().mean((2, 3))
    means = found.sums / block**2
    ratio = torch.where(means > 0, found.peaks / torch.where(means > 0, means, 1.0), 1.0)
    incoherence = ratio.mean((2, 3))
    total = sparsity.sum(1, keepdim=True)
    share = torch.where(total > 0, sparsity / torch.where(total > 0, total, 1.0), 0.0)
    evenness = 1 - incoherence / incoherence.sum(1, keepdim=True)
    score = alpha * share + (1 - alpha) * evenness
    # Rounded, as orders of the same blocks have the same score but for rounding.
    return Choice(sparsity, incoherence, score, score.round(decimals=9).argmax(1))
