"""The linear maps before an activation, z = x W, where kernels form z themselves.

The forward of `twofold` does: z is never stored, nor rounded before the activation is taken of it.
The backward has z in float32, formed anew: rounding it is most of what 16 bits would do to the
gradients of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.ops.linear.problem import Feature


def inside(feature: Feature, channels: int) -> Tensor | None:
    """W [1 | h, D, D] of a map that kernels can form, before its activation."""
    known: dict[str, Any] = getattr(feature.project, "keywords", {})
    weight, bias = known.get("weight"), known.get("bias")
    if weight is None or bias is not None or known.get("skip") or weight.shape[-1] != channels:
        return None
    return weight


def mapped(x: Tensor, weight: Tensor | None) -> Tensor:
    """z [B, h, n, D] in float32 of x; x itself where there is no map."""
    if weight is None:
        return x
    weight = weight.to(x.dtype).expand(x.shape[0], x.shape[1], -1, -1)
    if not x.is_cuda or x.dtype == torch.float32:
        return torch.matmul(x, weight).float()
    flat = torch.bmm(x.flatten(0, 1), weight.flatten(0, 1), out_dtype=torch.float32)
    return flat.view(x.shape)


def unmapped(
    gradient: Tensor, x: Tensor, weight: Tensor | None, learns: bool, real: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, and of W where it learns, from that of z; `real` [B, n]: rows there."""
    if weight is None:
        return gradient, None
    of_x = torch.matmul(gradient, weight.to(gradient.dtype).mT)
    if not learns:
        return of_x, None
    if real is not None:  # what others hold may be NaN, and 0 times that is no zero
        x = x.masked_fill(~real[:, None, :, None], 0.0)
    flat = x.flatten(0, 1).mT, gradient.flatten(0, 1)
    if x.is_cuda and x.dtype != torch.float32:
        of_weight = torch.bmm(*flat, out_dtype=torch.float32)
    else:
        of_weight = torch.bmm(*flat)
    of_weight = of_weight.unflatten(0, x.shape[:2]).sum(0)
    if weight.shape[0] == 1:
        of_weight = of_weight.sum(0, keepdim=True)
    return of_x, of_weight.to(weight.dtype)
