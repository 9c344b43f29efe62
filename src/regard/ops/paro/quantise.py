"""Symmetric integers for groups of rows, and products that are computed on them.

Groups are consecutive rows; the scale of a group is max |x| / top, and integers round half away
from zero. A ragged last group has the rows that there are.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_HELD = 1 << 19  # integers held at a time: 2 MB


def quantise_rows(x: Tensor, rows: int, top: int = 127) -> tuple[Tensor, Tensor]:
    """int8 of x's shape [..., L, D] and the scale of every group of `rows`, [..., ceil(L / rows)].

    >>> integers, scales = quantise_rows(torch.tensor([[1.0], [-0.5], [4.0]]), 2)
    >>> integers.flatten().tolist(), (scales * 127).tolist()
    ([127, -64, 127], [1.0, 4.0])
    """
    length = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -length % rows))
    groups = padded.unflatten(-2, (-1, rows))
    scales = groups.abs().amax((-2, -1)) / top
    safe = torch.where(scales == 0, 1.0, scales)[..., None, None]
    return round_away(groups / safe).to(torch.int8).flatten(-3, -2)[..., :length, :], scales


def dequantise_rows(integers: Tensor, scales: Tensor, rows: int) -> Tensor:
    """integers times the scale of their group."""
    spread = scales.repeat_interleave(rows, -1)[..., : integers.shape[-2]]
    return integers.to(scales.dtype) * spread[..., None]


def integer_product(q: Int[Tensor, "*b l d"], k: Int[Tensor, "*b s d"]) -> Float[Tensor, "*b l s"]:
    """q k^T of int8 tensors, exact, as float32.

    On a CPU by the integer instructions of the processor, some rows at a time, so that their sums
    are still in the cache when they become floats; elsewhere in float32, where sums of up to 1024
    products are exact.

    >>> q, k = torch.randint(-127, 128, (2, 3, 40, 64), dtype=torch.int8)
    >>> torch.equal(integer_product(q, k), q.float() @ k.float().mT)
    True
    """
    if q.device.type != "cpu" or not (q.numel() and k.numel()):
        return q.float() @ k.float().mT
    out = q.new_empty(*q.shape[:-1], k.shape[-2], dtype=torch.float32)
    pairs = zip(*(x.flatten(0, -3) if x.dim() > 2 else x[None] for x in (q, k, out)), strict=True)
    together = max(16, _HELD // k.shape[-2])
    for rows, keys, products in pairs:
        for first in range(0, len(rows), together):
            part = slice(first, first + together)
            products[part] = torch.ops.aten._int_mm(rows[part], keys.T)
    return out


def int8_scores(
    q: Int[Tensor, "*b l d"],
    q_scales: Float[Tensor, "*b n"],
    k: Int[Tensor, "*b s d"],
    k_scales: Float[Tensor, "*b m"],
    rows_q: int = 32,
    rows_k: int = 64,
) -> Float[Tensor, "*b l s"]:
    """Scores of what `quantise_rows` made of queries and keys: (q8 . k8) s_q s_k.

    >>> q, k = torch.randn(2, 3, 100, 64)
    >>> scores = int8_scores(*quantise_rows(q, 32), *quantise_rows(k, 64))
    >>> bool((scores - q @ k.mT).norm() < 0.015 * (q @ k.mT).norm())
    True
    """
    row = q_scales.repeat_interleave(rows_q, -1)[..., : q.shape[-2], None]
    column = k_scales.repeat_interleave(rows_k, -1)[..., None, : k.shape[-2]]
    return integer_product(q, k).mul_(row).mul_(column)


def round_away(x: Tensor) -> Tensor:
    """Rounds half away from zero."""
    return torch.trunc(x + 0.5 * x.sign())


def sage_quantise(
    q: Tensor, k: Tensor, *, smooth_k: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SageAttention's integers: q, its scales, k, its scales, and the mean of k.

    q [B, H, T, D] by 128 rows, after multiplication by scale log2 e in float32; k [B, Hk, S, D]
    by 64 rows, after subtraction of its mean over the sequence, which is rounded, as is the
    difference, to the dtype of k. The mean is 0 without `smooth_k`.
    """
    factor = (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e)
    mean = (
        k.float().mean(2, keepdim=True).to(k.dtype) if smooth_k else torch.zeros_like(k[:, :, :1])
    )
    q_int, q_scales = quantise_rows(q.float() * factor, 128)
    k_int, k_scales = quantise_rows((k - mean).float(), 64)
    return q_int, q_scales, k_int, k_scales, mean


def sage_attention(
    q: Tensor, k: Tensor, v: Tensor, *, smooth_k: bool = True, scale: float | None = None
) -> Tensor:
    """Softmax attention with int8 scores, as SageAttention computes it.

        o = sum_j 2^(s_j - m) v_j / sum_j 2^(s_j - m),   s = (q8 . k8) s_q s_k

    q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv]; blocks of 64 keys with a running maximum;
    weights and values meet in float16, and add up in float32. No gradient.
    """
    with torch.no_grad():
        group = q.shape[1] // k.shape[1]
        q_int, q_scales, k_int, k_scales, _ = sage_quantise(q, k, smooth_k=smooth_k, scale=scale)
        rows = q_scales.repeat_interleave(128, 2)[:, :, : q.shape[2], None]
        k_int, k_scales, v = (x.repeat_interleave(group, 1) for x in (k_int, k_scales, v))
        top = torch.full_like(rows, -torch.inf)
        total = torch.zeros_like(rows)
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float32)
        for block, start in enumerate(range(0, k.shape[2], 64)):
            products = integer_product(q_int, k_int[:, :, start : start + 64])
            scores = products * rows * k_scales[:, :, block, None, None]
            higher = torch.maximum(top, scores.amax(3, keepdim=True))
            weights, fade = torch.exp2(scores - higher), torch.exp2(top - higher)
            total = total * fade + weights.sum(3, keepdim=True)
            values = v[:, :, start : start + 64].half().float()
            out = out * fade + weights.half().float() @ values
            top = higher
        return (out / torch.where(total == 0, 1.0, total)).to(q.dtype)
