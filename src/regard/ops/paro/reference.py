"""Attention in an order of the axes, cell by cell, with a dense score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# What the codes of three axes name, as the released code numbers them.
_VIDEO = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")


def axis_order_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Tensor,
    kept: Tensor,
    *,
    grid: tuple[int, ...],
    text: int = 0,
    block: int = 64,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Query i sees key j if the block of the place of i and that of j keep each other; float64.

    Nothing is permuted: a token's place in a head's order is counted from its coordinates.
    For grids of one, two and three axes.
    """
    (B, H, T, D), axes = q.shape, len(grid)
    names = ("FHW"[:axes],) if axes == 1 else ("FH", "HF") if axes == 2 else _VIDEO
    sees = torch.zeros(B, H, T, T, dtype=torch.bool, device=q.device)
    for h, code in enumerate(codes.tolist()):
        places = list(range(text))
        for cell in range(T - text):
            coordinates, rest = {}, cell
            for name, size in reversed(list(zip("FHW", grid, strict=False))):
                coordinates[name], rest = rest % size, rest // size
            place = 0
            for name in names[code]:
                place = place * grid["FHW".index(name)] + coordinates[name]
            places.append(text + place)
        at = torch.tensor(places, dtype=torch.long, device=q.device) // block
        own = kept[:, h if kept.shape[1] > 1 else 0]
        sees[:, h] = own[:, at][:, :, at] != 0
    keys, values = (x.double().repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    factor = D**-0.5 if scale is None else scale
    factor = torch.as_tensor(factor, dtype=torch.float64, device=q.device).reshape(-1, 1, 1)
    scores = (q.double() * factor) @ keys.mT
    weights = scores.masked_fill(~sees, -torch.inf).softmax(3)
    return (torch.where(sees, weights, 0.0) @ values).to(q.dtype)
