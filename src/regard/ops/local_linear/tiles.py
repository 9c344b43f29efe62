"""The walk over tiles that the forward and the backward share.

Queries are taken in blocks, heads in groups that fit a memory budget; the query heads of one
key head are folded into the rows of the block, so that keys are never repeated. For one block
the weights of all its keys are held (`M x J`, a few megabytes); products of that size are made
tile by tile. Keys are centred once: scores, covariances and slopes see k - centre only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from regard.core.decay import DecaySums
from regard.core.precision import compute_dtype
from regard.core.visibility import Visibility

ROWS = 128  # rows (query heads of a group x queries) of a block
FEWEST_ROWS = 16
PANEL = 1 << 22  # elements of the weights of one block, over all heads taken together
TILE_KEYS = 2048  # keys of one product


@dataclass(frozen=True)
class Inputs:
    """What the registered ops receive, with the names that this folder uses.

    `ridge` [B | 1, H | 1, T | 1] and `scale` [B | 1, H | 1] are in the compute dtype.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ridge: Tensor
    scale: Tensor
    key_mask: Tensor | None
    key_bias: Tensor | None
    decay: DecaySums | None
    causal: bool
    window: tuple[int, int]
    absolute: bool

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.q.dtype)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def visibility(self) -> Visibility:
        return Visibility(
            self.q.shape[2], self.k.shape[2], self.causal, self.window, self.key_mask,
            self.key_bias, self.decay, heads=self.q.shape[1], device=self.q.device,
        )

    @property
    def ridge_rows(self) -> Tensor:
        """[B, H, T, 1], a view."""
        return self.ridge.expand(self.q.shape[:3])[..., None]

    @property
    def scale_rows(self) -> Tensor:
        """[B, H, T, 1], a view."""
        return self.scale.expand(self.q.shape[:2])[:, :, None, None].expand(*self.q.shape[:3], 1)


class Part(NamedTuple):
    """Batch rows [b0, b1) and key heads [h0, h1)."""

    b0: int
    b1: int
    h0: int
    h1: int


class Hidden(NamedTuple):
    """Columns [c0, c1) of a block in which the keys at `where` are not seen."""

    c0: int
    c1: int
    where: Tensor


@dataclass(frozen=True)
class Block:
    """Queries [i0, i1) against keys [low, high), and which of those position hides."""

    i0: int
    i1: int
    low: int
    high: int
    hidden: tuple[Hidden, ...]

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Columns [c0, c1) of the products, counted from `low`."""
        count = self.high - self.low
        for c0 in range(0, count, TILE_KEYS):
            yield c0, min(c0 + TILE_KEYS, count)

    def blank(self, product: Tensor, shape: tuple[int, ...], c0: int, c1: int) -> None:
        """Zeroes hidden entries of a product over columns [c0, c1).

        Weights are zero there, but 0 * inf is not: a later key may be any finite number.
        """
        for hidden in self.hidden:
            left, right = max(c0, hidden.c0), min(c1, hidden.c1)
            if left < right:
                where = hidden.where[..., left - hidden.c0 : right - hidden.c0]
                product.view(*shape, c1 - c0)[..., left - c0 : right - c0].masked_fill_(where, 0.0)


class Workspace:
    """Named scratch memory that blocks take turns in, so that it is mapped only once."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape; the previous one of that name is given up."""
        count = 1
        for size in shape:
            count *= size
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count:
            flat = self._flat[name] = self._like.new_empty(count, dtype=self._dtype)
        return flat[:count].view(shape)


def block_rows(inputs: Inputs, block_size: int) -> int:
    """Queries per block: from the sizes of one head only, never from the number of heads."""
    T, S, group = inputs.q.shape[2], inputs.k.shape[2], inputs.group
    if block_size <= 0:
        rows = ROWS if inputs.causal else min(max(ROWS, (ROWS << 12) // max(S, 1)), 8 * ROWS)
        rows = min(rows, max(FEWEST_ROWS, PANEL // max(S, 1)))
        block_size = max(1, rows // group)
    return min(block_size, max(T, 1))


def parts(inputs: Inputs, rows: int) -> list[Part]:
    """Heads taken together, as many as the memory budget allows."""
    B, Hk, S = inputs.k.shape[:3]
    heads = max(1, PANEL // max(1, rows * inputs.group * S))
    if heads >= Hk:
        step = heads // Hk
        return [Part(b, min(b + step, B), 0, Hk) for b in range(0, B, step)]
    return [Part(b, b + 1, h, min(h + heads, Hk)) for b in range(B) for h in range(0, Hk, heads)]


class Heads:
    """One part of the heads: its centred keys, its visibility, and the products over a block."""

    def __init__(self, inputs: Inputs, part: Part, space: Workspace) -> None:
        self.part, self.space, self.dtype = part, space, inputs.dtype
        self.group = inputs.group
        b0, b1, h0, h1 = part
        self.visibility = _narrow(inputs, part)
        self.by_position = replace(self.visibility, key_mask=None, key_bias=None, decay=None)
        k, v = (x[b0:b1, h0:h1].to(self.dtype) for x in (inputs.k, inputs.v))
        mask = self.visibility.key_mask
        if mask is not None:
            k, v = (torch.where(mask[:, None, :, None], x, 0.0) for x in (k, v))
        self.centre = _centre(k, mask, self.visibility.reach != (-1, -1))
        k = k - self.centre
        if mask is not None:
            k = torch.where(mask[:, None, :, None], k, 0.0)
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self.centre = self.centre.flatten(0, 1)  # [n, 1, D]

    def rows(self, x: Tensor, block: Block) -> Tensor:
        """The block's rows of x [B, H, T, X] as [n, M, X], in the compute dtype."""
        cut = self._cut(x, block)
        n = cut.shape[0] * cut.shape[1] // self.group
        rows = self.group * cut.shape[2]
        return cut.to(self.dtype).reshape(n, rows, cut.shape[3])

    def put(self, target: Tensor, block: Block, rows: Tensor) -> None:
        """Writes rows [n, M, X] to their place in target [B, H, T, X]."""
        cut = self._cut(target, block)
        cut.copy_(rows.view(cut.shape))

    def _cut(self, x: Tensor, block: Block) -> Tensor:
        b0, b1, h0, h1 = self.part
        return x[b0:b1, h0 * self.group : h1 * self.group, block.i0 : block.i1]

    def shape(self, block: Block) -> tuple[int, int, int]:
        """[batch, query heads, queries]: what [n, M] unfolds to."""
        b0, b1, h0, h1 = self.part
        return b1 - b0, (h1 - h0) * self.group, block.i1 - block.i0

    def keys(self, block: Block, c0: int, c1: int) -> Tensor:
        return self.k[:, block.low + c0 : block.low + c1]

    def values(self, block: Block, c0: int, c1: int) -> Tensor:
        return self.v[:, block.low + c0 : block.low + c1]

    def block(self, i0: int, i1: int) -> Block | None:
        """The block of queries [i0, i1), or None if position alone hides every key."""
        low, high = self.visibility.key_range(i0, i1)
        if low == high:
            return None
        hidden = []
        for c0, c1 in self._segments(i0, i1, low, high):
            mask = self.by_position.tile((i0, i1), (low + c0, low + c1), self.dtype).mask
            if mask is not None:
                hidden.append(Hidden(c0, c1, ~mask))
        return Block(i0, i1, low, high, tuple(hidden))

    def _segments(self, i0: int, i1: int, low: int, high: int) -> list[tuple[int, int]]:
        """Column ranges: cut by the left edge of the band, inside it, cut by its right edge."""
        left, right = self.visibility.reach
        offset = self.visibility.offset
        start = low if left < 0 else min(max(i1 - 1 + offset - left, low), high)
        stop = high if right < 0 else min(max(i0 + offset + right + 1, low), high)
        edges = [low, start, stop, high] if start < stop else [low, high]
        return [(a - low, b - low) for a, b in pairwise(edges) if a < b]

    def scores(self, block: Block, queries: Tensor) -> Tensor:
        """Scaled queries [n, M, D] against the block's keys, -inf where a key is not seen."""
        out = self.space.take("weights", *queries.shape[:2], block.high - block.low)
        for c0, c1 in block.tiles():
            torch.bmm(queries, self.keys(block, c0, c1).mT, out=out[:, :, c0:c1])
        unfolded = out.view(*self.shape(block), -1)
        for c0, c1 in self._segments(block.i0, block.i1, block.low, block.high):
            columns = (block.low + c0, block.low + c1)
            tile = self.visibility.tile((block.i0, block.i1), columns, self.dtype)
            if tile.bias is not None:
                unfolded[..., c0:c1].add_(tile.bias)
            if tile.mask is not None:
                unfolded[..., c0:c1].masked_fill_(~tile.mask, -torch.inf)
        return out

    def product(self, block: Block, rows: Tensor, c0: int, c1: int, name: str = "tile") -> Tensor:
        """Rows [n, M, X] times the keys or values of a tile, in scratch memory."""
        out = self.space.take(name, *rows.shape[:2], c1 - c0)
        return torch.bmm(rows, self.keys(block, c0, c1).mT, out=out)

    def mean_key(self, block: Block, weights: Tensor) -> Tensor:
        """sum_j weights_j k_j, [n, M, D]."""
        total = weights.new_zeros(*weights.shape[:2], self.k.shape[2])
        for c0, c1 in block.tiles():
            total.baddbmm_(weights[:, :, c0:c1], self.keys(block, c0, c1))
        return total

    def covariance(self, block: Block, weights: Tensor, mean: Tensor, x: Tensor) -> Tensor:
        """sum_j weights_j (x . (k_j - mean)) k_j: the weighted covariance applied to x.

        The mean is taken off before the second product, not after: that is what keeps float32
        accurate where the keys that a row looks at lie far from the common centre.
        """
        shift = (x * mean).sum(-1, keepdim=True)
        total = torch.zeros_like(x)
        for c0, c1 in block.tiles():
            tile = self.product(block, x, c0, c1).sub_(shift).mul_(weights[:, :, c0:c1])
            block.blank(tile, self.shape(block), c0, c1)
            total.baddbmm_(tile, self.keys(block, c0, c1))
        return total


def walk(inputs: Inputs, block_size: int, space: Workspace) -> Iterator[tuple[Heads, Block]]:
    """All blocks that see any key, part after part."""
    rows, T = block_rows(inputs, block_size), inputs.q.shape[2]
    for part in parts(inputs, rows):
        heads = Heads(inputs, part, space)
        for i0 in range(0, T, rows):
            block = heads.block(i0, min(i0 + rows, T))
            if block is not None:
                yield heads, block


def _narrow(inputs: Inputs, part: Part) -> Visibility:
    """The visibility of one part of the heads."""
    b0, b1, h0, h1 = part
    Hk, group = inputs.k.shape[1], inputs.group

    def cut(operand: Tensor) -> Tensor:
        if operand.shape[1] == 1:
            return operand[b0:b1]
        per = 1 if operand.shape[1] == Hk else group
        return operand[b0:b1, h0 * per : h1 * per]

    whole = inputs.visibility
    decay = None if whole.decay is None else DecaySums(*map(cut, whole.decay))
    return replace(
        whole,
        key_mask=None if whole.key_mask is None else whole.key_mask[b0:b1],
        key_bias=None if whole.key_bias is None else cut(whole.key_bias),
        decay=decay,
        heads=(h1 - h0) * group,
    )


def _centre(k: Tensor, mask: Tensor | None, banded: bool) -> Tensor:
    """The shared centre [b, heads, 1, D] of keys whose masked ones are zero.

    The mean where every query sees every real key; otherwise the first real key, which no
    later key can change.
    """
    if banded:
        if mask is None:
            return k[:, :, :1]
        first = mask.int().argmax(1)
        return k.gather(2, first[:, None, None, None].expand(*k.shape[:2], 1, k.shape[3]))
    if mask is None:
        return k.mean(2, keepdim=True)
    return k.sum(2, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None, None]
