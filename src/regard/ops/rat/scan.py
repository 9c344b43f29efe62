"""The gated average inside every chunk, in eager torch: L steps over all chunks at once.

    h_t = g_t h_(t-1) + (1 - g_t) x_t,   h = 0 before a chunk, `carry` before the first

Tensors [B, Hk, places, D], the carry [B, Hk, D]; `chunk` places to a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, gate: Tensor, carry: Tensor, chunk: int) -> Tensor:
    """h of every place."""
    h, before = torch.empty_like(x, memory_format=torch.contiguous_format), None
    for step in range(min(chunk, x.shape[2])):
        g, new = gate[:, :, step::chunk], x[:, :, step::chunk]
        now = torch.mul(1 - g, new, out=h[:, :, step::chunk])
        if before is not None:
            now.addcmul_(g, before[:, :, : g.shape[2]])
        else:
            now[:, :, 0].addcmul_(g[:, :, 0], carry)
        before = now
    return h


def backward(
    grad: Tensor, h: Tensor, x: Tensor, gate: Tensor, carry: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and carry."""
    d_x, d_gate = torch.empty_like(h), torch.empty_like(h)
    back = torch.zeros_like(h[:, :, ::chunk])  # from the next step of a chunk, if it has one
    for step in reversed(range(min(chunk, h.shape[2]))):
        g, new = gate[:, :, step::chunk], x[:, :, step::chunk]
        n = g.shape[2]
        everything = grad[:, :, step::chunk] + back[:, :, :n]
        if step:
            before = h[:, :, step - 1 :: chunk][:, :, :n]
        else:
            before = torch.zeros_like(new)
            before[:, :, 0] = carry
        torch.mul(1 - g, everything, out=d_x[:, :, step::chunk])
        torch.mul(before - new, everything, out=d_gate[:, :, step::chunk])
        back[:, :, :n] = g * everything
    return d_x, d_gate, back[:, :, 0].clone() if back.shape[2] else torch.zeros_like(carry)
