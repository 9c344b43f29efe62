"""A short causal convolution along the tokens, which sees real tokens of its own sequence only."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.core.checks import check_shape
from regard.core.precision import compute_dtype
from regard.mixers.positions import positions


class ShortConvolution(nn.Module):
    """Each channel's weighted sum over the last few tokens, through SiLU.

        y_t = silu(sum_j w_j x_(t-j) + b),   j = 0 .. size - 1

    where t counts real tokens: padding is left out (not read as zero between real tokens), and
    a sequence of a pack does not see its neighbours. Masked places give 0.

    Args:
        channels: C.
        size: tokens seen, the present one included.
        bias: whether there is a b, zero at the start.

    Precision: sums in float32 at least; the result has x's dtype.
    Cost: O(T C size).
    Source: the layer before the recurrences of Gu and Dao, "Mamba", 2023, arXiv 2312.00752.

    >>> convolution = ShortConvolution(8, 4)
    >>> x = torch.randn(2, 6, 8)
    >>> whole, _ = convolution(x)
    >>> first, past = convolution(x[:, :4])
    >>> last, past = convolution(x[:, 4:], past=past)
    >>> torch.allclose(torch.cat([first, last], 1), whole, atol=1e-6), past.shape
    (True, torch.Size([2, 3, 8]))
    """

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights, as `nn.Conv1d` draws them."""
        bound = 1 / math.sqrt(self.size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.size}"

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        *,
        key_mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        past: Float[Tensor, "b size-1 c"] | None = None,
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b size-1 c"]]:
        """The outputs, and the last `size - 1` real inputs, with which to go on."""
        B, T, C = x.shape
        kept = self.size - 1
        if past is not None:
            check_shape("ShortConvolution", "past", past, (B, kept, C), x)
        before = x.new_zeros(B, kept, C) if past is None else past.to(x.dtype)
        at = None
        if cu_seqlens is not None:
            at = positions(T, key_mask, cu_seqlens, x.device)
        if key_mask is None:
            line = torch.cat([before, x], 1)
            after = line.narrow(1, T, kept).clone()  # not a view that keeps all inputs alive
            return self._sum(line, at), after
        # Real tokens are moved next to each other, to the front, and back afterwards.
        order = torch.argsort((~key_mask).to(torch.uint8), dim=1, stable=True)
        front = torch.where(key_mask[..., None], x, 0.0).gather(1, _over(order, C))
        line = torch.cat([before, front], 1)
        last = key_mask.sum(1, keepdim=True) + torch.arange(kept, device=x.device)
        at = at if at is None else at.gather(1, order)
        place = (key_mask.cumsum(1) - 1).clamp(min=0)
        out = self._sum(line, at).gather(1, _over(place, C))
        return torch.where(key_mask[..., None], out, 0.0), line.gather(1, _over(last, C))

    def _sum(self, line: Tensor, at: Tensor | None) -> Tensor:
        """The outputs for all of `line` but its first `size - 1` rows.

        `at` tells how many tokens of the same sequence come before each.
        """
        T = line.shape[1] - self.size + 1
        taps = self.weight.to(compute_dtype(line.dtype)).unbind(1)
        total = line.narrow(1, self.size - 1, T) * taps[0]
        for back in range(1, self.size):
            piece = line.narrow(1, self.size - 1 - back, T)
            if at is not None:
                piece = torch.where((at >= back)[..., None], piece, 0.0)
            total = total + piece * taps[back]
        if self.bias is not None:
            total = total + self.bias.to(total.dtype)
        return silu(total).to(line.dtype)


def _over(index: Tensor, channels: int) -> Tensor:
    """An index [B, T] for all channels."""
    return index[..., None].expand(-1, -1, channels)
