"""Where a token stands in its sequence, and rotary position embedding."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.precision import compute_dtype


def positions(
    length: int,
    key_mask: Bool[Tensor, "b t"] | None,
    cu_seqlens: Int[Tensor, " n"] | None,
    device: torch.device,
) -> Int[Tensor, "#b t"]:
    """How many real tokens of its own sequence come before each token: [1 or B, T], int64.

    Padding, on whichever side or in between, is not counted, and packed sequences start anew.
    A masked token has the position of the next real one.

    >>> positions(4, torch.tensor([[False, True, True, True]]), None, torch.device("cpu"))
    tensor([[0, 0, 1, 2]])
    >>> positions(5, None, torch.tensor([0, 3, 5], dtype=torch.int32), torch.device("cpu"))
    tensor([[0, 1, 2, 0, 1]])
    """
    places = torch.arange(length, device=device)[None]
    before = places if key_mask is None else key_mask.cumsum(1) - key_mask.long()
    if cu_seqlens is None:
        return before
    sequence = torch.searchsorted(cu_seqlens[1:], places[0].int(), right=True)
    first = cu_seqlens.long().index_select(0, sequence.clamp(max=len(cu_seqlens) - 1))
    # The clamps matter only for offsets that the op is about to refuse.
    return before - before.index_select(1, first.clamp(max=max(length - 1, 0)))


def rotate(
    x: Float[Tensor, "b h t d"], at: Int[Tensor, "#b t"], base: float = 10000.0
) -> Float[Tensor, "b h t d"]:
    """Turns each pair of channels (c, c + D/2) by an angle that grows with the position.

        (x_c, x_c+D/2) -> (x_c cos a - x_c+D/2 sin a, x_c+D/2 cos a + x_c sin a),
        a = position base ** (-2 c / D)

    so that q . k depends on the difference of their positions only. Halves, not neighbours, are
    paired, as in the checkpoints that Hugging Face publishes.

    Precision: angles in float64 (in float32 they are off by 1e-2 at a million tokens), the
    turn in float32 at least; the result has x's dtype.
    Source: Su et al., "RoFormer", 2021, arXiv 2104.09864.

    >>> x = torch.randn(1, 1, 3, 4)
    >>> torch.equal(rotate(x, torch.zeros(1, 3, dtype=torch.int64)), x)
    True
    """
    half, dtype = x.shape[3] // 2, compute_dtype(x.dtype)
    power = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angle = (at[..., None] * torch.pow(base, -power))[:, None]
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    one, other = x[..., :half], x[..., half:]
    turned = torch.cat([one * cosine - other * sine, other * cosine + one * sine], 3)
    return turned.to(x.dtype)
