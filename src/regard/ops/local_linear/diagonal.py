"""Block-diagonal covariances: the probe of the whole head made from those of its blocks.

The authors keep only diagonal blocks, b x b, of the second moment around the query,
Sigma = sum_j p_j z_j z_j^T + lambda I with z_j = k_j - q, but all channels in the weights

    p_j (1 - z_j . rho) / (1 - m . rho),    rho = Sigma^-1 m,    m = sum_j p_j z_j.

Per block Sigma_b = (C_b + lambda I) + m_b m_b^T; with h_b = (C_b + lambda I)^-1 m_b and
s_b = m_b . h_b, rho_b = h_b / (1 + s_b). The weights are then p_j (1 - g . (k_j - kbar)) with

    g = rho / (1 - m . rho),    1 - m . rho = 1 - sum_b s_b / (1 + s_b).

With one block g = h. With more, the denominator is no longer positive: it can vanish.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joined(h: Tensor, m: Tensor, width: int) -> Tensor:
    """g from the solutions h of the blocks, [n, M, D]."""
    rho, denominator, _ = _parts(h, m, width)
    return rho / denominator


def joined_backward(
    h: Tensor, m: Tensor, width: int, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of h and of m from that of g."""
    rho, denominator, s = _parts(h, m, width)
    c = 1 / denominator
    of_s = c * c * (gradient * rho).sum(-1, keepdim=True) - c * _dots(gradient, h, width)
    of_s = of_s / (1 + s).square()
    of_h = c * gradient / _spread(1 + s, width) + _spread(of_s, width) * m
    return of_h, _spread(of_s, width) * h


def _parts(h: Tensor, m: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    s = _dots(h, m, width)
    rho = h / _spread(1 + s, width)
    return rho, 1 - (s / (1 + s)).sum(-1, keepdim=True), s


def _dots(x: Tensor, y: Tensor, width: int) -> Tensor:
    """x_b . y_b of every block, [n, M, blocks]."""
    return (x * y).unflatten(2, (-1, width)).sum(-1)


def _spread(s: Tensor, width: int) -> Tensor:
    return torch.repeat_interleave(s, width, 2)
