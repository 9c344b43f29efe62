"""The native form of attention of blocks to blocks with a halo: boxes of rows of a padded map.

What depends on the place of a key in its window must not depend on the window, for which every key
is one row only. So places are counted modulo the side of a window: a window has every remainder
once, and a query that asks for place j asks for remainder (first place + j) mod side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.core.attention_pair import attention_pair
from regard.ops.block_sparse.native import walk
from regard.ops.block_sparse.native.library import BOXES

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, int block, int halo, SymInt[] size, SymInt[] inside, float scale"
)


def remainders(x: Tensor, block: int, axis: int) -> Tensor:
    """x [..., side] by place in the window, of blocks along `axis`, as x by remainder."""
    blocks, side = x.shape[axis], x.shape[-1]
    first = torch.arange(blocks, device=x.device)[:, None] * block
    place = (torch.arange(side, device=x.device) - first) % side
    shape = [1] * x.dim()
    shape[axis], shape[-1] = blocks, side
    return x.gather(-1, place.view(shape).expand(x.shape))


def marked(k: Tensor, side: int) -> Tensor:
    """k [N, height, width, D] with the unit vectors of its row's and column's remainder behind."""
    N, height, width, _ = k.shape
    units = torch.zeros(height, width, 2 * side, dtype=k.dtype, device=k.device)
    row, column = (torch.arange(n, device=k.device) % side for n in (height, width))
    units.scatter_(2, row.view(-1, 1, 1).expand(-1, width, 1), 1.0)
    units.scatter_(2, column.view(1, -1, 1).expand(height, -1, 1) + side, 1.0)
    return torch.cat((k, units.repeat(N, 1, 1, 1)), 3)  # contiguous parts: four times as fast


@lru_cache(maxsize=16)
def _boxes(
    down: int, right: int, block: int, halo: int, width: int, inside: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Offsets, starts and lengths of the segments of all windows, and how many keys they have."""
    side = block + 2 * halo
    places = torch.arange(side)
    ends = []
    for blocks, size in zip((down, right), inside, strict=True):
        first = torch.arange(blocks) * block
        low, high = torch.zeros_like(first), torch.full_like(first, side)
        if size >= 0:  # of the places of a window, those on the map
            low = (halo - first).clamp(min=0)
            high = (size + halo - first).clamp(max=side)
        ends.append((first, low, high))
    (top, low_y, high_y), (left, low_x, high_x) = ends
    seen = ((places >= low_y[:, None]) & (places < high_y[:, None]))[:, None].expand(-1, right, -1)
    start = (top[:, None] + places)[:, None] * width + (left + low_x)[:, None]
    length = (high_x - low_x)[:, None].expand(down, right, side)
    offsets = torch.zeros(down * right + 1, dtype=torch.int64)
    offsets[1:] = seen.sum(2).flatten().cumsum(0)
    return offsets, start[seen].int(), length[seen].int(), int(length[seen].sum())


def _lists(
    q: Tensor, block: int, halo: int, size: Sequence[int], inside: Sequence[int]
) -> walk.Lists:
    down, right = size[0] // block, size[1] // block
    width = size[1] + 2 * halo
    offsets, start, length, pairs = _boxes(down, right, block, halo, width, tuple(inside))
    lists, queries = down * right, q.shape[2]
    numbers = {
        "kind": BOXES, "plan_batch": 1, "plan_heads": 1, "lists": lists, "width": 0,
        "keys": (size[0] + 2 * halo) * width, "block_q": queries // lists, "block_k": 1,
        "left": -1, "right": -1, "replicate": 0, "pools": 0,
    }  # fmt: skip
    mask_at = torch.full((lists,), -1, dtype=torch.int64)
    tensors: dict[str, Tensor | None] = {
        "offsets": offsets, "mask_at": mask_at, "start": start, "length": length
    }  # fmt: skip
    return walk.Lists(numbers, tensors, pairs * (queries // lists))


def _forward(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *places, scale = settings
    found = walk.forward("halo_attention", q, k, v, None, _lists(q, *places), scale)
    assert found is not None  # boxes hold no values that could be wrong
    return found


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    *places, scale = settings
    lists = _lists(q, *places)
    return walk.backward("halo_attention", d_out, out, lse, q, k, v, None, lists, scale)[:3]


halo_boxes = attention_pair("halo_native", _ARGUMENTS, _forward, _backward)
