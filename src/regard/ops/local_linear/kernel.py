"""The Gaussian kernel as scores of the dot kind, with a bias per key.

    -scale |q - k|^2 / 2 = scale q . k - scale |k|^2 / 2 - scale |q|^2 / 2

The last term is the same for all keys of a row: it cancels in the weights, and counts in their
log-sum-exp, hence in an absolute ridge, which is then added to the Gram of the weights
exp(-scale |q - k|^2 / 2). All of it sees only differences: q and k are taken from a centre
first, so that a common offset costs no digits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.ops.local_linear.tiles import centre_of

if TYPE_CHECKING:
    from regard.ops.local_linear.forms import Call


def as_dot(call: Call) -> Call:
    """The same call with dot scores: centred q and k in the compute dtype, and biases."""
    dtype, heads = compute_dtype(call.q.dtype), call.q.shape[1]
    q, k, mask = call.q.to(dtype), call.k.to(dtype), call.key_mask
    real = None if mask is None else mask[:, None, :, None]
    if real is not None:
        k = torch.where(real, k, 0.0)
    group = heads // k.shape[1]
    if call.intercept and k.shape[2]:  # without one the fit itself is not shift-invariant
        banded = call.causal or call.window not in (None, (-1, -1))
        centre = centre_of(k.detach(), mask, banded)
        k = k - centre
        if real is not None:
            k = torch.where(real, k, 0.0)
        q = q - centre.repeat_interleave(group, 1)
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    squares = _squares(k)
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(-1, 1)
        squares = squares.repeat_interleave(group, 1)
    bias = -0.5 * scale * squares
    if call.key_bias is not None:
        bias = _sum(bias, call.key_bias.to(dtype), heads)
    row_bias = -0.5 * scale * _squares(q)
    return replace(call, q=q, k=k, key_bias=bias, row_bias=row_bias)


def _squares(x: Tensor) -> Tensor:
    """|x|^2, large instead of infinite: a later token may be any number, and 0 inf is no 0."""
    limit = (torch.finfo(x.dtype).max / (4 * x.shape[-1])) ** 0.5
    return x.clamp(-limit, limit).square().sum(-1)


def _sum(one: Tensor, other: Tensor, heads: int) -> Tensor:
    """Two biases on 1, Hk or H heads each."""
    if one.shape[1] != other.shape[1] and 1 not in (one.shape[1], other.shape[1]):
        one, other = (x.repeat_interleave(heads // x.shape[1], 1) for x in (one, other))
    return one + other
