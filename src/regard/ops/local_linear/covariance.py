"""Key covariances of every query of a block, as one product, and their Cholesky factors.

The weights [M, J] of a block times the outer products [J, D (D + 1) / 2] of its keys are the
M second moments. The outer products are made in panels of at most 16 MB; a head whose keys
fit into one panel as a whole makes them once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.ops.local_linear.layout import Block
from regard.ops.local_linear.tiles import Heads

PANEL_BYTES = 16 << 20
MATRICES = 1 << 22  # elements of the D x D matrices that are held at once
STEP = 2048  # keys of one product
FEW_ROWS = 4  # up to here the weighted keys, D x J, cost less than their outer products


@dataclass(frozen=True)
class Factors:
    """Lower Cholesky factors of rows [n, M], cut into pieces along the rows' places."""

    pieces: list[tuple[slice, slice, Tensor]]
    sound: Tensor  # [n, M, 1]: no pivot below half the ridge, which bounds every exact pivot

    def solve(self, right: Tensor) -> Tensor:
        """x of C x = right, [n, M, D]."""
        x = torch.empty_like(right)
        for h, rows, lower in self.pieces:  # lower [heads, rows, blocks, b, b]
            part = right[h, rows].unflatten(2, lower.shape[2:4])
            x[h, rows] = torch.cholesky_solve(part[..., None], lower).flatten(2)
        return x


def factor(
    heads: Heads,
    block: Block,
    weights: Tensor,
    inverse: Tensor | None,
    mean: Tensor,
    ridge: Tensor,
) -> Factors:
    """Factors of C + ridge I, or of its diagonal blocks; a row without keys has C = 0."""
    n, M, D = mean.shape
    width = heads.width
    rows = max(1, min(M, MATRICES // (D * width)))
    step = max(1, MATRICES // (rows * D * width))
    pieces, sound = [], torch.empty_like(ridge, dtype=torch.bool)
    for h0 in range(0, n, step):
        for r0 in range(0, M, rows):
            at = (slice(h0, min(h0 + step, n)), slice(r0, min(r0 + rows, M)))
            moment = _moments(heads, block, weights, *at)
            if inverse is not None:
                moment.mul_(inverse[at][..., None, None])
            centre = mean[at].unflatten(2, (-1, width))
            moment.sub_(centre[..., :, None] * centre[..., None, :])
            moment.diagonal(dim1=-2, dim2=-1).add_(ridge[at][..., None])
            lower, info = torch.linalg.cholesky_ex(moment)
            pivots = lower.diagonal(dim1=-2, dim2=-1)
            least = pivots.amin((-2, -1))[..., None].square()
            sound[at] = (info == 0).all(-1, keepdim=True) & (least >= ridge[at] / 2)
            pieces.append((*at, lower))
    return Factors(pieces, sound)


def _moments(heads: Heads, block: Block, weights: Tensor, h: slice, rows: slice) -> Tensor:
    """sum_j w_j k_j k_j^T [heads, rows, blocks, b, b], of which the lower triangle is right."""
    D, width = heads.k.shape[2], heads.width
    w = weights[h, rows]
    if w.shape[1] <= FEW_ROWS:
        keys = heads.k[h, block.low : block.high]
        moment = w.new_empty(*w.shape[:2], D // width, width, width)
        for row in range(w.shape[1]):
            scaled = keys * w[:, row, :, None]
            for number, at in enumerate(heads.spans()):
                torch.bmm(scaled[..., at].mT, keys[..., at], out=moment[:, row, number])
        return moment
    left, right = torch.tril_indices(width, width, device=w.device)
    place = left * width + right
    starts = torch.arange(0, D, width, device=w.device)[:, None]
    left, right = ((x + starts).flatten() for x in (left, right))
    place = (place + width * starts).flatten()
    packed = w.new_zeros(*w.shape[:2], len(left))
    for c0, c1, outer in _outer_products(heads, block, h, left, right):
        heads.collect(packed, w[:, :, c0:c1], outer)
    moment = w.new_zeros(*w.shape[:2], D * width)
    moment.index_copy_(2, place, packed)
    return moment.unflatten(2, (D // width, width, width))


def _outer_products(heads: Heads, block: Block, h: slice, left: Tensor, right: Tensor):
    """Columns [c0, c1) of the block and the lower halves of k k^T of their keys."""
    count = h.stop - h.start
    fit = max(1, PANEL_BYTES // (count * len(left) * heads.k.element_size()))
    whole = heads.k.shape[1] <= fit
    # In steps of few different lengths: oneDNN keeps what it prepared for each shape.
    step = STEP if whole else min(fit, STEP // 4)
    length = block.high - block.low
    if whole and (heads.outer is None or heads.outer[0] != h):
        heads.outer = (h, _outer(heads.k[h], left, right))
    for c0 in range(0, length, step):
        c1 = min(c0 + step, length)
        if whole and heads.outer is not None:
            yield c0, c1, heads.outer[1][:, block.low + c0 : block.low + c1]
        else:
            yield c0, c1, _outer(heads.k[h, block.low + c0 : block.low + c1], left, right)


def _outer(keys: Tensor, left: Tensor, right: Tensor) -> Tensor:
    # A later key may be any finite number, and its weight is 0: its square must not be inf.
    # A row that does see such a key gets a wrong matrix, and is told by its residual.
    limit = torch.finfo(keys.dtype).max ** 0.49
    keys = keys.clamp(-limit, limit)
    return keys.index_select(2, left) * keys.index_select(2, right)
