"""Windows on a grid, one axis at a time: which coordinates a query sees, and what tiles share.

A window on a grid is a product of intervals, so that everything about it is known from its axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """What a query sees along one axis: `left` before its own place and `right` behind it.

    -1 is without bound. inward: pushed inwards at the borders, so that it keeps its width.
    """

    left: int
    right: int
    inward: bool = False

    def interval(self, x: int, size: int) -> tuple[int, int]:
        """The first and the last coordinate that a query at x sees on an axis of `size`.

        Where the axis is narrower than an inward window, all of it is seen.
        """
        low = 0 if self.left < 0 else x - self.left
        high = size - 1 if self.right < 0 else x + self.right
        if self.inward and self.left >= 0 and self.right >= 0:
            low, high = low - max(0, high - size + 1), high + max(0, -low)
        return max(low, 0), min(high, size - 1)


class Side(NamedTuple):
    """A tile on one axis: its queries, the keys [low, high) that any of them sees, and who which.

    seen: for each query (the last one again where the axis ends in the tile) the keys it sees,
    relative to low; None where every query sees all of them.
    """

    start: int
    queries: int
    low: int
    high: int
    seen: tuple[tuple[int, int], ...] | None


def sides(size: int, keys: int, window: Window, tile: int) -> list[Side]:
    """All tiles of one axis of `size` queries, the last of which stands at the last key."""
    found = []
    for start in range(0, size, tile):
        reaches = [
            window.interval(min(x, size - 1) + keys - size, keys)
            for x in range(start, start + tile)
        ]
        some = [(a, b + 1) for a, b in reaches if a <= b]
        low, high = min((a for a, _ in some), default=0), max((b for _, b in some), default=0)
        seen = tuple((a - low, b - low) for a, b in reaches)
        whole = all(reach == (0, high - 1 - low) for reach in seen)
        found.append(Side(start, min(tile, size - start), low, high, None if whole else seen))
    return found


class Geometry(NamedTuple):
    """Tiles [first, last) that see the same shape of keys in the same way."""

    first: int
    last: int
    rows: Tensor  # [tiles, keys]: tokens
    hidden: Tensor | None  # [1, queries of a tile, keys]


class Tiling(NamedTuple):
    """A grid cut into tiles, ordered by geometry.

    order: the tokens of all tiles, [tiles * queries]; a tile that sticks out of the grid repeats
    its last tokens there (`filling`). place: where each token is in that order.
    """

    queries: int
    order: Tensor
    filling: Tensor
    place: Tensor
    geometries: tuple[Geometry, ...]


@lru_cache(maxsize=16)
def tiling(
    grid: tuple[int, ...], keys: tuple[int, ...], windows: tuple[Window, ...],
    tile: tuple[int, ...],
) -> Tiling:  # fmt: skip
    """The tiles of a grid in raster order (the last axis fastest), on the CPU.

    `grid` is that of the queries; each axis ends where the axis of `keys` ends.
    """
    axes = [
        sides(size, behind, window, side)
        for size, behind, window, side in zip(grid, keys, windows, tile, strict=True)
    ]
    groups: dict[tuple[object, ...], list[tuple[Side, ...]]] = {}
    for sides_of_tile in product(*axes):
        shape = tuple((side.high - side.low, side.seen) for side in sides_of_tile)
        groups.setdefault(shape, []).append(sides_of_tile)
    order, filling, geometries, first = [], [], [], 0
    for tiles in groups.values():
        for tokens, spare in (_tokens(one, grid, tile) for one in tiles):
            order.append(tokens)
            filling.append(spare)
        rows = torch.stack([_box(one, keys) for one in tiles])
        last = first + len(tiles)
        geometries.append(Geometry(first, last, rows, _hidden(tiles[0], tile)))
        first = last
    flat = torch.cat(order) if order else torch.zeros(0, dtype=torch.long)
    spare = torch.cat(filling) if filling else torch.zeros(0, dtype=torch.bool)
    place = torch.zeros(math.prod(grid), dtype=torch.long)
    place[flat[~spare]] = torch.arange(len(flat))[~spare]
    return Tiling(math.prod(tile), flat, spare, place, tuple(geometries))


def _strides(grid: tuple[int, ...]) -> Iterator[int]:
    step = 1
    for size in reversed(grid):
        yield step
        step *= size


def _flat(coordinates: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """The raster indices of a product of coordinates."""
    total = torch.zeros((), dtype=torch.long)
    for values, step in zip(coordinates, reversed(list(_strides(grid))), strict=True):
        total = total[..., None] + values * step
    return total.flatten()


def _tokens(
    tile_sides: tuple[Side, ...], grid: tuple[int, ...], tile: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    coordinates = [
        torch.arange(side.start, side.start + length).clamp(max=side.start + side.queries - 1)
        for side, length in zip(tile_sides, tile, strict=True)
    ]
    spare = torch.zeros((), dtype=torch.bool)
    for side, length in zip(tile_sides, tile, strict=True):
        spare = spare[..., None] | (torch.arange(length) >= side.queries)
    return _flat(coordinates, grid), spare.flatten()


def _box(tile_sides: tuple[Side, ...], grid: tuple[int, ...]) -> Tensor:
    return _flat([torch.arange(side.low, side.high) for side in tile_sides], grid)


def _hidden(tile_sides: tuple[Side, ...], tile: tuple[int, ...]) -> Tensor | None:
    """[1, queries, keys]: which keys of the box a query does not see."""
    if all(side.seen is None for side in tile_sides):
        return None
    seen = torch.ones(1, 1, dtype=torch.bool)
    for side, length in zip(tile_sides, tile, strict=True):
        keys = torch.arange(side.high - side.low)
        if side.seen is None:
            own = torch.ones(length, len(keys), dtype=torch.bool)
        else:
            own = torch.stack([(keys >= a) & (keys <= b) for a, b in side.seen])
        seen = (seen[:, None, :, None] & own[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return ~seen[None]
