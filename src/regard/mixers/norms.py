"""Norms over the last axis, summed in float32 at least."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.core.precision import compute_dtype


class RMSNorm(nn.Module):
    """Brings the last axis to a root mean square of 1, and multiplies by a learned gain.

        y = gain x / sqrt(mean(x^2) + eps)

    Unlike `torch.nn.RMSNorm`, the gain may have another dtype than x (under autocast it has),
    and eps does not depend on the dtype.

    Precision: in float32 at least; the result has x's dtype.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv 1910.07467.

    >>> y = RMSNorm(64)(3 * torch.randn(2, 64))
    >>> torch.allclose(y.square().mean(-1), torch.ones(2), atol=1e-4)
    True
    """

    def __init__(self, size: int, eps: float = 1e-6, start: float = 1.0) -> None:
        super().__init__()
        self.eps, self.start = eps, start
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gain at its start."""
        nn.init.constant_(self.weight, self.start)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps:g}"

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The same shape and dtype."""
        wide = x.to(compute_dtype(x.dtype))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * inverse * self.weight).to(x.dtype)


class UnitNorm(nn.Module):
    """Brings the last axis to length 1; there is nothing to learn.

        y = x / sqrt(sum(x^2) + eps)

    Precision: in float32 at least; the result has x's dtype. A row of zeros stays zero.

    >>> UnitNorm()(torch.tensor([300.0, 400.0]))
    tensor([0.6000, 0.8000])
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The same shape and dtype."""
        wide = x.to(compute_dtype(x.dtype))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + self.eps)).to(x.dtype)
