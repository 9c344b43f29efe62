"""Tokens as an image: grids, and windows cut from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from regard.core.checks import reject, words


def check_grid(op: str, grid: Any, name: str = "grid") -> tuple[int, int]:
    """(height, width) from a pair of positive ints, or from one for both."""
    sides: Any = (grid, grid) if isinstance(grid, int) else grid
    pair = isinstance(sides, Sequence) and len(sides) == 2
    if not pair or not all(type(side) is int and side > 0 for side in sides):
        raise reject(op, name, "(height, width), two ints of at least 1", grid, kind=TypeError)
    return sides[0], sides[1]


def grid_of(op: str, grid: Any, tokens: int) -> tuple[int, int]:
    """The grid of so many tokens: the given one if it fits, a square for None."""
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            accepted = "given where the tokens are no square"
            raise reject(op, "grid", accepted, words(f"{tokens} tokens"))
        return side, side
    h, w = int(grid[0]), int(grid[1])
    if h * w != tokens:
        raise reject(op, "grid", f"of {tokens} tokens in all", grid)
    return h, w


def cut(x: Float[Tensor, "b h w c"], window: tuple[int, int]) -> Float[Tensor, "b n m c"]:
    """The windows of a map whose sides are multiples of theirs: n of them, m tokens each."""
    B, H, W, C = x.shape
    h, w = window
    return x.view(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(B, -1, h * w, C)


def join(
    windows: Float[Tensor, "b n m c"], window: tuple[int, int], sides: tuple[int, int]
) -> Float[Tensor, "b h w c"]:
    """The inverse of `cut`, for a map of these sides."""
    (h, w), (H, W) = window, sides
    B, C = windows.shape[0], windows.shape[3]
    return windows.view(B, H // h, W // w, h, w, C).transpose(2, 3).reshape(B, H, W, C)
