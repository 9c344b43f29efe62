"""The regions of a map: cut out, attended to, and put together again."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard.ops.routed import routed_attention


def regions_of(
    x: Float[Tensor, "b h i j d"], region: tuple[int, int]
) -> Float[Tensor, "b h r m d"]:
    """The regions of a map in raster order, filled up with zeros on the right and below.

    >>> regions_of(torch.zeros(1, 2, 5, 8, 3), (2, 4)).shape
    torch.Size([1, 2, 6, 8, 3])
    """
    B, H, h, w, D = x.shape
    a, b = region
    x = pad(x, (0, 0, 0, -w % b, 0, -h % a))
    high, wide = x.shape[2] // a, x.shape[3] // b
    return x.view(B, H, high, a, wide, b, D).transpose(3, 4).reshape(B, H, high * wide, a * b, D)


def map_of(
    x: Float[Tensor, "b h r m d"], region: tuple[int, int], sides: tuple[int, int]
) -> Float[Tensor, "b h i j d"]:
    """The inverse of `regions_of` for a map of these sides."""
    (a, b), (h, w) = region, sides
    B, H, D = x.shape[0], x.shape[1], x.shape[4]
    high, wide = -(-h // a), -(-w // b)
    x = x.view(B, H, high, wide, a, b, D).transpose(3, 4)
    return x.reshape(B, H, high * a, wide * b, D)[:, :, :h, :w]


def real_tokens(
    sides: tuple[int, int], region: tuple[int, int], device: torch.device
) -> Bool[Tensor, "1 r m"] | None:
    """Which tokens of the regions belong to the map; None if all do."""
    if not (sides[0] % region[0] or sides[1] % region[1]):
        return None
    inside = torch.ones(1, 1, *sides, 1, device=device)
    return regions_of(inside, region)[:, 0, :, :, 0] > 0


def routed_attention_2d(
    q: Float[Tensor, "b h i j d"],
    k: Float[Tensor, "b hk a c d"],
    v: Float[Tensor, "b hk a c dv"],
    route: Int[Tensor, "#b #h r n"],
    *,
    region: tuple[int, int],
    kv_region: tuple[int, int] | None = None,
    scale: float | None = None,
    mask_padding: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "b h i j dv"]:
    """`routed_attention` on maps [B, H, height, width, D], cut into regions of these sides.

    kv_region: of k and v, whose map may be another; None is as of q. mask_padding: zeros that
    fill a map up to whole regions are not seen; otherwise they are keys with score and value 0,
    as in the released operator.

    >>> q, k, v = torch.randn(3, 1, 2, 12, 12, 8)
    >>> route = torch.zeros(1, 1, 12, 1, dtype=torch.long)
    >>> routed_attention_2d(q, k, v, route, region=(3, 4)).shape
    torch.Size([1, 2, 12, 12, 8])
    """
    behind = region if kv_region is None else kv_region
    real = None
    if mask_padding:
        real = real_tokens((k.shape[2], k.shape[3]), behind, q.device)
        real = None if real is None else real.expand(len(k), -1, -1)
    out = routed_attention(
        regions_of(q, region), regions_of(k, behind), regions_of(v, behind), route, scale=scale,
        key_mask=real, impl=impl,
    )  # fmt: skip
    return map_of(out, region, (q.shape[2], q.shape[3]))
