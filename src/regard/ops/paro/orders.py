"""Orders of the axes of a token grid, one per head.

Tokens: `text` of them, then a grid in raster order, the last axis fastest. A code names an order
of the axes: of three (frame, height, width) 0 FHW, 1 FWH, 2 HWF, 3 HFW, 4 WHF, 5 WFH, as in the
released code; of any other number the permutations of the axes in lexicographic order.
"""

from __future__ import annotations

import math
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
    """Every head's tokens in its own order of the axes; text stays in front.

    >>> x = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 2, 4, 1)
    >>> permute_heads(x, torch.tensor([0, 1]), (2, 2))[0, :, :, 0].tolist()
    [[0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 1.0, 3.0]]
    """
    _check_tokens("permute_heads", x, codes, grid, text)
    return take(x, orders_of(codes, grid, text, x.device))


def unpermute_heads(
    x: Float[Tensor, "b h l d"], codes: Int[Tensor, " h"], grid: tuple[int, ...], text: int = 0
) -> Float[Tensor, "b h l d"]:
    """Undoes `permute_heads`."""
    _check_tokens("unpermute_heads", x, codes, grid, text)
    return take(x, inverse(orders_of(codes, grid, text, x.device)))


def orders_of(
    codes: Tensor, grid: tuple[int, ...], text: int, device: torch.device
) -> Int[Tensor, "h l"]:
    """The tokens of every head in its own order."""
    orders = axis_orders(grid, text).to(device)
    # `gather` refuses a code out of range, also a negative one.
    return orders.gather(0, codes.to(device).long()[:, None].expand(-1, orders.shape[1]))


def inverse(order: Int[Tensor, "h l"]) -> Int[Tensor, "h l"]:
    """The permutations that undo these."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def take(x: Float[Tensor, "b hk l d"], order: Int[Tensor, "h l"]) -> Float[Tensor, "b h l d"]:
    """Rows of x in the order of every head, H a multiple of Hk: whole rows are copied at once."""
    (B, Hk, L, D), H = x.shape, order.shape[0]
    head = torch.arange(H, device=x.device) // max(H // max(Hk, 1), 1)
    image = torch.arange(B, device=x.device)[:, None] * Hk
    index = (image + head)[..., None] * L + order
    return torch.nn.functional.embedding(index, x.reshape(B * Hk * L, D))


def check_grid(op: str, grid: object, text: object) -> None:
    """ValueError unless grid is a tuple of positive ints and text an int of at least 0."""
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


def _check_tokens(op: str, x: Tensor, codes: Tensor, grid: tuple[int, ...], text: int) -> None:
    check_grid(op, grid, text)
    if x.dim() != 4 or x.shape[2] != text + math.prod(grid):
        length = text + math.prod(grid)
        raise reject(op, "x", f"[B, H, {length}, D] for grid {grid} and text {text}", x)
    check_codes(op, codes, x.shape[1], len(grid))
