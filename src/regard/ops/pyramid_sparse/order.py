"""Orders of tokens in which neighbours in a sequence are neighbours in a video, or in meaning.

An order is int64 [L]: `x[order]` is rearranged, and position i holds the token order[i] of the
raster, whose last axis is the fastest. `inverse(order)` undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from regard.core.accumulate import add_rows

Vector = tuple[int, int, int]


def inverse(order: Tensor) -> Tensor:
    """The order that undoes `order` (along its last axis)."""
    places = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, places.expand(order.shape))


@lru_cache(maxsize=64)
def gilbert_order(grid: tuple[int, ...]) -> Tensor:
    """The generalised Hilbert curve of a grid (depth, height, width), of any sizes.

    A grid of one or two axes is one of depth 1. Steps are of one cell where sizes are even.

    >>> gilbert_order((2, 2)).tolist()
    [0, 2, 3, 1]
    """
    depth, height, width = _three(grid)
    if math.prod(grid) == 0:
        return torch.empty(0, dtype=torch.int64)
    x, y, z = (width, 0, 0), (0, height, 0), (0, 0, depth)
    if width >= height and width >= depth:
        axes = x, y, z
    elif height >= width and height >= depth:
        axes = y, x, z
    else:
        axes = z, x, y
    cells = [x + width * (y + height * z) for x, y, z in _walk((0, 0, 0), *axes)]
    return torch.tensor(cells)


def tile_order(grid: tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """Tile after tile, raster within and among them; every size must be a multiple.

    >>> tile_order((2, 4), (2, 2)).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    if len(tile) != len(grid) or any(t < 1 or n % t for n, t in zip(grid, tile, strict=True)):
        raise ValueError(f"tile_order: tile must divide the grid {grid}, got {tile}")
    cells = torch.arange(math.prod(grid))
    pairs = [size for n, t in zip(grid, tile, strict=True) for size in (n // t, t)]
    axes = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
    return cells.view(pairs).permute(axes).flatten()


def with_text(order: Tensor, text: int, *, behind: bool) -> Tensor:
    """`order` of a sequence that has `text` tokens in front: left there, or moved behind."""
    words = torch.arange(text, device=order.device)
    return torch.cat([order + text, words] if behind else [words, order + text])


def semantic_order(
    x: Tensor, clusters: int, *, steps: int, centres: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens by the cluster they belong to: order [B, H, L] and centres [B, H, n, D].

    k-means: `steps` rounds of Lloyd's algorithm from `centres`, or from evenly spread tokens;
    a cluster that loses its tokens keeps its centre. Within a cluster the order stays.
    """
    length = x.shape[2]
    if centres is None:
        clusters = min(clusters, length)
        start = torch.arange(clusters, device=x.device) * length // max(1, clusters)
        centres = x[:, :, start]
    points = x.float()
    centres = centres.float()
    first = torch.arange(centres.shape[:2].numel(), device=x.device) * centres.shape[2]
    for _ in range(steps):
        own = (_nearest(points, centres).flatten(0, 1) + first[:, None]).flatten()
        sums = torch.zeros_like(centres)
        add_rows(sums.view(-1, sums.shape[3]), own, points.flatten(0, 2))
        counts = torch.bincount(own, minlength=sums.shape[:3].numel()).view(*sums.shape[:3], 1)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return _nearest(points, centres).sort(dim=2, stable=True).indices, centres


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    step = max(1, (1 << 21) // max(1, centres.shape[2] * points.shape[0] * points.shape[1]))
    half = centres.square().sum(3)[:, :, None] / 2
    parts = [(part @ centres.mT - half).argmax(3) for part in points.split(step, 2)]
    return torch.cat(parts, 2)


def _three(grid: tuple[int, ...]) -> Vector:
    if not 1 <= len(grid) <= 3 or any(not isinstance(n, int) or n < 0 for n in grid):
        raise ValueError(f"gilbert_order: grid must be one to three sizes, got {grid}")
    depth, height, width = (1,) * (3 - len(grid)) + tuple(grid)
    return depth, height, width


def _walk(at: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """The cells of the box spanned by a (the major axis), b and c from the corner `at`."""
    w, h, d = (abs(sum(axis)) for axis in (a, b, c))
    da, db, dc = (_step(axis) for axis in (a, b, c))
    for length, step, others in ((w, da, (h, d)), (h, db, (w, d)), (d, dc, (w, h))):
        if others == (1, 1):
            for i in range(length):
                yield _sum(at, _times(i, step))
            return
    a2, b2, c2 = (_half(*pair) for pair in ((a, da), (b, db), (c, dc)))
    to_a, to_b, to_c = _sum(a, _times(-1, a2)), _sum(b, _times(-1, b2)), _sum(c, _times(-1, c2))
    back_a, back_b, back_c = (_times(-1, x) for x in (to_a, b2, c2))
    end_a, end_c = _sum(a, _times(-1, da)), _sum(c, _times(-1, dc))
    near_b, near_c = _sum(b2, _times(-1, db)), _sum(c2, _times(-1, dc))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        boxes = ((), (a2, b, c)), ((a2,), (to_a, b, c))
    elif 3 * h > 4 * d:
        boxes = (
            ((), (b2, c, a2)),
            ((b2,), (a, to_b, c)),
            ((end_a, near_b), (back_b, c, back_a)),
        )
    elif 3 * d > 4 * h:
        boxes = (
            ((), (c2, a2, b)),
            ((c2,), (a, b, to_c)),
            ((end_a, near_c), (back_c, back_a, b)),
        )
    else:
        boxes = (
            ((), (b2, c2, a2)),
            ((b2,), (c, a2, to_b)),
            ((near_b, end_c), (a, back_b, _times(-1, to_c))),
            ((end_a, b2, end_c), (_times(-1, c), back_a, to_b)),
            ((end_a, near_b), (back_b, c2, back_a)),
        )
    for offsets, axes in boxes:
        yield from _walk(_sum(at, *offsets), *axes)


def _half(axis: Vector, step: Vector) -> Vector:
    half: Vector = (axis[0] // 2, axis[1] // 2, axis[2] // 2)
    if abs(sum(half)) % 2 and abs(sum(axis)) > 2:
        return _sum(half, step)
    return half


def _step(axis: Vector) -> Vector:
    x, y, z = ((n > 0) - (n < 0) for n in axis)
    return x, y, z


def _sum(*vectors: Vector) -> Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))  # pyright: ignore[reportReturnType]


def _times(n: int, vector: Vector) -> Vector:
    return n * vector[0], n * vector[1], n * vector[2]
