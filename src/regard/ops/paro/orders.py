"""Orders of the axes of a token grid, one per head.

Tokens: `text` of them, then a grid in raster order, the last axis fastest. A code names an order
of the axes: of three (frame, height, width) 0 FHW, 1 FWH, 2 HWF, 3 HFW, 4 WHF, 5 WFH, as in the
released code; of any other number the permutations of the axes in lexicographic order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.checks import reject, words

_THREE = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))


def codes_of(axes: int) -> tuple[tuple[int, ...], ...]:
    """The order of axes that each code names.

    >>> codes_of(2)
    ((0, 1), (1, 0))
    """
    return _THREE if axes == 3 else tuple(permutations(range(axes)))


@lru_cache(maxsize=64)
def axis_orders(grid: tuple[int, ...], text: int = 0) -> Int[Tensor, "codes l"]:
    """The tokens in every order of the axes, int64 [codes, text + cells]: x[order[c]].

    >>> axis_orders((2, 3), text=1).tolist()
    [[0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 2, 5, 3, 6]]
    """
    check_grid("axis_orders", grid, text)
    cells = torch.arange(math.prod(grid)).view(grid) + text
    orders = [cells.permute(axes).flatten() for axes in codes_of(len(grid))]
    return torch.cat([torch.arange(text).expand(len(orders), -1), torch.stack(orders)], 1)


def permute_heads(
    x: Float[Tensor, "b h l d"], codes: Int[Tensor, " h"], grid: tuple[int, ...], text: int = 0
) -> Float[Tensor, "b h l d"]:
    """Every head's tokens in its own order of the axes; text stays in front."""
    order = _orders("permute_heads", x, codes, grid, text)
    return x.gather(2, order[None, :, :, None].expand_as(x))


def unpermute_heads(
    x: Float[Tensor, "b h l d"], codes: Int[Tensor, " h"], grid: tuple[int, ...], text: int = 0
) -> Float[Tensor, "b h l d"]:
    """Undoes `permute_heads`."""
    order = _orders("unpermute_heads", x, codes, grid, text).argsort(1)
    return x.gather(2, order[None, :, :, None].expand_as(x))


def check_grid(op: str, grid: object, text: object) -> None:
    sizes = isinstance(grid, tuple) and all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid
    )
    if not sizes or not grid:
        raise reject(op, "grid", "a tuple of positive ints", grid)
    if isinstance(text, bool) or not isinstance(text, int) or text < 0:
        raise reject(op, "text", "an int of at least 0", text)


def check_codes(op: str, codes: Tensor, heads: int, axes: int) -> None:
    """ValueError unless codes are integers [heads], each the code of an order of these axes."""
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dtype == torch.bool:
        raise reject(op, "codes", "a tensor of integers", codes, kind=TypeError)
    if tuple(codes.shape) != (heads,):
        raise reject(op, "codes", f"of shape [{heads}]", codes)
    count = math.factorial(axes)
    if heads and not 0 <= int(codes.min()) <= int(codes.max()) < count:
        raise reject(op, "codes", f"in [0, {count})", words(str(codes.tolist())))


def _orders(op: str, x: Tensor, codes: Tensor, grid: tuple[int, ...], text: int) -> Tensor:
    check_grid(op, grid, text)
    if x.dim() != 4 or x.shape[2] != text + math.prod(grid):
        length = text + math.prod(grid)
        raise reject(op, "x", f"[B, H, {length}, D] for grid {grid} and text {text}", x)
    check_codes(op, codes, x.shape[1], len(grid))
    return axis_orders(grid, text).to(x.device)[codes.to(x.device).long()]
