"""The walk over tiles that the forward and the backward share.

Queries are taken in blocks, heads in groups that fit a memory budget; the query heads of one
key head are folded into the rows of the block, so that keys are never repeated. For one block
the weights of all its keys are held (`M x J`, a few megabytes); products of that size are made
tile by tile. Keys are centred once: scores, covariances and slopes see k - centre only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from regard.core.decay import DecaySums
from regard.core.visibility import Visibility
from regard.ops.local_linear import gemm
from regard.ops.local_linear.layout import TILE_KEYS, Block, Hidden, Inputs, Part, Workspace

LOG2E = 1 / math.log(2.0)
ROWS = 128  # rows (query heads of a group x queries) of a block
LONG = 2048  # keys from which blocks are twice as high
FEWEST_ROWS = 16
PANEL = 1 << 22  # elements of the weights of one block, over all heads taken together
TOGETHER = 4  # heads at once where each has products of its own: they share all that is small,
CACHED = 1 << 21  # and each product reads weights again, of which so many stay in a cache
WHOLE_VECTORS = 32  # numbers that torch takes at once, or a multiple
TAME = 1e15  # keys below this have no products that overflow float32


def block_rows(inputs: Inputs, block_size: int) -> int:
    """Queries per block: from the sizes of one head only, never from the number of heads."""
    T, S, group = inputs.q.shape[2], inputs.k.shape[2], inputs.group
    if block_size <= 0:
        rows = ROWS if S < LONG else 2 * ROWS
        if not inputs.causal:
            rows = min(max(rows, (ROWS << 12) // max(S, 1)), 8 * ROWS)
        rows = min(rows, max(FEWEST_ROWS, PANEL // 2 // max(S, 1)))
        block_size = max(1, rows // group)
    return min(block_size, max(T, 1))


def parts(inputs: Inputs, rows: int) -> list[Part]:
    """Heads taken together, as many as the memory budget allows."""
    B, Hk, S, D = inputs.k.shape
    per_row = max(1, S, D * inputs.width // 2)  # its weights, or its covariance
    heads = max(1, PANEL // max(1, rows * inputs.group * per_row))
    if gemm.serves(inputs.q, inputs.dtype, rows * inputs.group, S):
        heads = min(heads, TOGETHER, max(1, CACHED // (rows * inputs.group * max(S, 1))))
    if heads >= Hk:
        step = heads // Hk
        return [Part(b, min(b + step, B), 0, Hk) for b in range(0, B, step)]
    return [Part(b, b + 1, h, min(h + heads, Hk)) for b in range(B) for h in range(0, Hk, heads)]


class Heads:
    """One part of the heads: its centred keys, its visibility, and the products over a block."""

    def __init__(self, inputs: Inputs, part: Part, rows: int, space: Workspace) -> None:
        self.part, self.space, self.dtype = part, space, inputs.dtype
        self.group = inputs.group
        b0, b1, h0, h1 = part
        self.visibility = _narrow(inputs, part)
        self.by_position = replace(self.visibility, key_mask=None, key_bias=None, decay=None)
        k, v = (x[b0:b1, h0:h1].to(self.dtype) for x in (inputs.k, inputs.v))
        mask = self.visibility.key_mask
        if mask is not None:
            k, v = (torch.where(mask[:, None, :, None], x, 0.0) for x in (k, v))
        self.intercept, self.width = inputs.intercept, inputs.width
        if inputs.intercept:
            self.centre = centre_of(k, mask, self.visibility.reach != (-1, -1))
        else:
            self.centre = torch.zeros_like(k[:, :, :1])
        k = k - self.centre
        if mask is not None:
            k = torch.where(mask[:, None, :, None], k, 0.0)
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self.centre = self.centre.flatten(0, 1)  # [n, 1, D]
        self.onednn = gemm.serves(self.k, self.dtype, rows * self.group, k.shape[2])
        # Weights of hidden keys are 0, and so are their products unless these overflow. This is
        # asked only where it is known at once, and decides nothing but whether zeros are written.
        self.tame = self.onednn and inputs.probe is None and bool(self.k.abs().amax() < TAME)
        self.k_and_one = self.k
        if self.onednn:  # a product with a constant per row added to it
            self.k_and_one = torch.nn.functional.pad(self.k, (0, 1), value=1.0)
        self.outer: tuple[slice, Tensor] | None = None  # of the keys of some heads, if they fit

    def rows(self, x: Tensor, block: Block) -> Tensor:
        """The block's rows of x [B, H, T, X] as [n, M, X], in the compute dtype."""
        cut = self._cut(x, block)
        n = cut.shape[0] * cut.shape[1] // self.group
        rows = self.group * cut.shape[2]
        return cut.to(self.dtype).reshape(n, rows, cut.shape[3])

    def put(
        self, target: Tensor, block: Block, rows: Tensor, only: Tensor | None = None
    ) -> None:
        """Writes rows [n, M, X] to their place in target [B, H, T, X]; all, or `only` [n, M, 1]."""
        cut = self._cut(target, block)
        new = rows.view(cut.shape)
        if only is not None:
            new = torch.where(only.view(*cut.shape[:3], 1), new.to(target.dtype), cut)
        cut.copy_(new)

    def flags(self, x: Tensor, block: Block) -> Tensor:
        """The block's rows of a bool tensor [B, H, T] as [n, M, 1]."""
        cut = self._cut(x[..., None], block)
        return cut.reshape(-1, self.group * cut.shape[2], 1)

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
        """Scaled queries [n, M, D] against the block's keys, -inf where a key is not seen.

        In bits, to the base of 2: torch's exp2 is four times faster than its exp.
        """
        queries = queries * LOG2E
        count = block.high - block.low
        if self.onednn and len(queries) == 1 and count <= TILE_KEYS:
            out = self.product(block, queries, 0, count)
        else:
            out = self.space.take("weights", *queries.shape[:2], count)
            for c0, c1 in block.tiles():
                if self.onednn:
                    for one, rows, keys in self._each(out, queries, self.keys(block, c0, c1)):
                        one[:, c0:c1] = gemm.times(rows, keys)
                else:
                    torch.bmm(queries, self.keys(block, c0, c1).mT, out=out[:, :, c0:c1])
        unfolded = out.view(*self.shape(block), -1)
        for c0, c1 in self._segments(block.i0, block.i1, block.low, block.high):
            columns = (block.low + c0, block.low + c1)
            tile = self.visibility.tile((block.i0, block.i1), columns, self.dtype)
            if tile.bias is not None:
                unfolded[..., c0:c1].add_(tile.bias, alpha=LOG2E)
            if tile.mask is not None:
                unfolded[..., c0:c1].masked_fill_(~tile.mask, -torch.inf)
        return out

    @staticmethod
    def exp2_(x: Tensor) -> Tensor:
        """2^x of the heads' tiles [n, M, J], in place.

        On a CPU torch rounds what is left at the end of a tensor, beyond whole vectors, by other
        code than the rest: a head among others would differ from the same head alone.
        """
        left = x.device.type == "cpu" and x[0].numel() % WHOLE_VECTORS
        for one in x if left else (x,):
            one.exp2_()
        return x

    def product(self, block: Block, rows: Tensor, c0: int, c1: int, name: str = "tile") -> Tensor:
        """Rows [n, M, D] times the keys of a tile, in memory that may be written over."""
        return self.times(rows, self.keys(block, c0, c1), name)

    def times(self, rows: Tensor, matrix: Tensor, name: str) -> Tensor:
        """rows [n, M, X] times the transpose of matrix [n, keys, X], likewise."""
        if self.onednn:
            return _stacked([gemm.times(*pair) for pair in self._each(rows, matrix)])
        out = self.space.take(name, *rows.shape[:2], matrix.shape[1])
        return torch.bmm(rows, matrix.mT, out=out)

    @staticmethod
    def _each(*stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Matrices [n, ., .] of which oneDNN takes one at a time."""
        return zip(*(x.unbind() for x in stacks), strict=True)

    def plus(self, block: Block, tile: Tensor, rows: Tensor, c0: int, c1: int) -> Tensor:
        """A tile plus rows times its keys; the tile is given up."""
        if self.onednn:
            each = self._each(rows, self.keys(block, c0, c1), tile)
            return _stacked([gemm.times_and_add(*one) for one in each])
        return tile.baddbmm_(rows, self.keys(block, c0, c1).mT)

    def weighted(
        self, block: Block, weights: Tensor, rows: Tensor, constant: Tensor, c0: int, c1: int
    ) -> Tensor:
        """weights_j (rows . k_j + constant) of a tile, 0 where hidden; constant is [n, M, 1]."""
        w = weights[:, :, c0:c1]
        if self.onednn:
            both = torch.cat([rows, constant], 2)
            keys = self.k_and_one[:, block.low + c0 : block.low + c1]
            each = self._each(both, keys, w)
            tile = _stacked([gemm.times_and_weigh(*one) for one in each])
        else:
            tile = self.product(block, rows, c0, c1).add_(constant).mul_(w)
        self.blank(block, tile, c0, c1)
        return tile

    def weighted_sums(
        self, block: Block, weights: Tensor, rows: Tensor, constant: Tensor, matrix: Tensor,
        sums: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """sum_j w_j x_j [n, M, X] and, if asked, sum_j w_j [n, M, 1] over all keys of the block.

        w are the tiles of `weighted`, x_j the keys or values of matrix [n, S, X]. Results of
        oneDNN are used where they lie, one head at a time.
        """
        out = rows.new_empty(*rows.shape[:2], matrix.shape[2])
        total = torch.zeros_like(constant) if sums else None
        matrix = matrix[:, block.low : block.high]
        if not self.onednn:
            out.zero_()
            for c0, c1 in block.tiles():
                tile = self.weighted(block, weights, rows, constant, c0, c1)
                out.baddbmm_(tile, matrix[:, c0:c1])
                if total is not None:
                    total += tile.sum(-1, keepdim=True)
            return out, total
        both = torch.cat([rows, constant], 2)
        keys = self.k_and_one[:, block.low : block.high]
        each = self._each(both, weights, keys, matrix, out)
        for head, (x, w, k, m, found) in enumerate(each):
            for c0, c1 in block.tiles():
                tile = gemm.times_and_weigh(x, k[c0:c1], w[:, c0:c1])
                self.blank(block, tile, c0, c1)
                product = gemm.times(tile, m[c0:c1].t())
                found.copy_(product) if c0 == 0 else found.add_(product)
                if total is not None:
                    total[head] += tile.sum(-1, keepdim=True)
        return out, total

    def collect(self, total: Tensor, tile: Tensor, matrix: Tensor) -> None:
        """total [n, M, X] += tile [n, M, keys] times the keys or values [n, keys, X] of a tile."""
        if self.onednn:
            for one, weights, rows in self._each(total, tile, matrix):
                one.add_(gemm.times(weights, rows.t()))
        else:
            total.baddbmm_(tile, matrix)

    def collect_columns(
        self, total: Tensor, tile: Tensor, rows: Tensor, sign: float = 1.0
    ) -> None:
        """total [n, keys, X] += sign tile^T [n, keys, M] rows [n, M, X]."""
        if self.onednn:
            for one, weights, x in self._each(total, tile, rows):
                product = gemm.times(x.t(), weights.t())  # the other way round: twice as fast
                one.add_(product.t(), alpha=sign)
        else:
            total.baddbmm_(tile.mT, rows, alpha=sign)

    def blank(self, block: Block, product: Tensor, c0: int, c1: int) -> None:
        """Zeroes what position hides of a product over columns [c0, c1) of the block.

        The product is of all heads of the part [n, M, keys] or of one of them [M, keys].
        """
        if not self.tame:
            batch, count, queries = self.shape(block)
            shape = (batch, count, queries) if product.dim() == 3 else (1, self.group, queries)
            block.blank(product, shape, c0, c1)

    def mean_key(self, block: Block, weights: Tensor) -> Tensor:
        """sum_j weights_j k_j, [n, M, D]; 0 without an intercept."""
        total = weights.new_zeros(*weights.shape[:2], self.k.shape[2])
        for c0, c1 in block.tiles() if self.intercept else ():
            self.collect(total, weights[:, :, c0:c1], self.keys(block, c0, c1))
        return total

    def offset(self, g: Tensor, mean: Tensor) -> Tensor:
        """What is left of 1 - g . (k - mean) at k = 0; 0 - g . k without an intercept."""
        at_mean = (g * mean).sum(-1, keepdim=True)
        return 1 + at_mean if self.intercept else at_mean

    def covariance(
        self, block: Block, weights: Tensor, mean: Tensor, x: Tensor, precise: bool
    ) -> Tensor:
        """sum_j weights_j (x . (k_j - mean)) k_j: the weighted covariance applied to x.

        The mean is taken off before the second product, not after: that is what keeps float32
        accurate where the keys that a row looks at lie far from the common centre. `precise`
        takes it off the second factor as well, which matters to what rounding left in the first:
        exactly it sums to 0.
        """
        if self.width == x.shape[2]:
            shift = -(x * mean).sum(-1, keepdim=True)
            total, rest = self.weighted_sums(block, weights, x, shift, self.k, precise)
            return total if rest is None else total.addcmul_(rest, mean, value=-1)
        total = torch.zeros_like(x)
        for at in self.spans():
            part, goal = x[..., at], total[..., at]
            shift = (part * mean[..., at]).sum(-1, keepdim=True)
            for c0, c1 in block.tiles():
                keys = self.keys(block, c0, c1)[..., at]
                tile = self.space.take("tile", *x.shape[:2], c1 - c0)
                torch.bmm(part, keys.mT, out=tile).sub_(shift).mul_(weights[:, :, c0:c1])
                block.blank(tile, self.shape(block), c0, c1)
                goal.baddbmm_(tile, keys)
                if precise:
                    goal.addcmul_(tile.sum(-1, keepdim=True), mean[..., at], value=-1)
        return total

    def spans(self) -> list[slice]:
        """The channels of each diagonal block of the covariance."""
        D = self.k.shape[2]
        return [slice(c, c + self.width) for c in range(0, D, self.width)]


def _stacked(matrices: list[Tensor]) -> Tensor:
    """[n, ., .]; a single one is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def walk(inputs: Inputs, block_size: int, space: Workspace) -> Iterator[tuple[Heads, Block]]:
    """All blocks that see any key, part after part."""
    rows, T = block_rows(inputs, block_size), inputs.q.shape[2]
    for part in parts(inputs, rows):
        heads = Heads(inputs, part, rows, space)
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


def centre_of(k: Tensor, mask: Tensor | None, banded: bool) -> Tensor:
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
