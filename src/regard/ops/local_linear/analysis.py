"""Looking into a fit: its signed weights, and the local slope of values over keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.core import checks
from regard.core.decay import DecaySums
from regard.ops.local_linear import forms
from regard.ops.local_linear.blockwise import Fit, fit, signed
from regard.ops.local_linear.tiles import PANEL, Block, Heads, Inputs, Workspace, walk


def local_linear_weights(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    *,
    causal: bool = False,
    ridge: float | Tensor = 1.0,
    ridge_mode: Literal["relative", "absolute"] = "relative",
    scale: float | Tensor | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    window: tuple[int, int] | None = None,
    tol: float | None = None,
    max_iters: int | None = None,
) -> Float[Tensor, "b h t s"]:
    """The signed weights p_j (1 - g . (k_j - kbar)) with which local linear attention sums v.

    out = weights @ v. Rows sum to 1 (to 0 where no key is seen), however few iterations the
    solver made; single weights may be negative or above 1. Arguments as for
    `local_linear_attention`, which also says what the symbols are and where they come from.

    Precision: computed in float32 (float64 for float64 inputs), returned in that dtype.
    Cost: that of the attention, and T x S memory for the result. No gradients.

    >>> import torch
    >>> x = torch.randn(1, 1, 5, 3)
    >>> weights = local_linear_weights(x, x, causal=True)
    >>> weights.shape, torch.allclose(weights.sum(-1), torch.ones(5))
    (torch.Size([1, 1, 5, 5]), True)
    """
    call = _call(
        "local_linear_weights", q, k, k, causal, ridge, ridge_mode, scale, key_mask, key_bias,
        log_decay, window, tol, max_iters,
    )
    with torch.no_grad():
        inputs = _inputs(call)
        B, H, T, D = q.shape
        weights = torch.zeros(B, H, T, k.shape[2], dtype=inputs.dtype, device=q.device)
        for heads, block, found in _fits(inputs, call.tol, call.max_iters or 2 * D + 8):
            for c0, c1 in block.tiles():
                target = weights[..., block.low + c0 : block.low + c1]
                heads.put(target, block, signed(heads, block, found, c0, c1) * found.inverse)
    return weights


def local_linear_slope(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    ridge: float | Tensor = 1.0,
    ridge_mode: Literal["relative", "absolute"] = "relative",
    scale: float | Tensor | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    window: tuple[int, int] | None = None,
) -> Float[Tensor, "b h t dv d"]:
    """The slope W of the affine map that local linear attention fits around each query.

    W_i = Cov_p(v, k) (Cov_p(k, k) + lambda I)^-1, so that out_i = vbar_i + W_i (q_i - kbar_i)
    and d out / d(position of the query at fixed weights) = W_i. Arguments as for
    `local_linear_attention`, which also says where the symbols come from. A query that sees no
    key, or one key only, has slope 0.

    Precision: computed in float64 by a direct solve; returned in float32 (float64 for float64
    inputs). Cost: O(T S D (D + Dv) + T D^3); memory O(T D Dv) for the result. No gradients.

    >>> import torch
    >>> k = torch.randn(1, 1, 50, 2)
    >>> v = k @ torch.tensor([[1.0], [-2.0]])
    >>> local_linear_slope(k[:, :, :1], k, v, ridge=1e-9)[0, 0, 0].round(decimals=4)
    tensor([[ 1., -2.]])
    """
    call = _call(
        "local_linear_slope", q, k, v, causal, ridge, ridge_mode, scale, key_mask, key_bias,
        log_decay, window, None, None,
    )
    with torch.no_grad():
        inputs = _inputs(call, torch.float64)
        B, H, T, D = q.shape
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        slope = torch.zeros(B, H, T, v.shape[3] * D, dtype=kind, device=q.device)
        for heads, block, found in _fits(inputs, 1.0, 1):  # only its weights are used
            heads.put(slope, block, _slope(heads, block, found).flatten(2))
    return slope.unflatten(3, (v.shape[3], D))


def _slope(heads: Heads, block: Block, found: Fit) -> Tensor:
    """[n, M, Dv, D]: covariances as products of the weights with the keys' outer products."""
    n, M, D = found.mean.shape
    Dv = heads.v.shape[2]
    covariance = found.mean.new_zeros(n, M, D * D)
    mixed = found.mean.new_zeros(n, M, Dv * D)
    value = found.mean.new_zeros(n, M, Dv)
    count = block.high - block.low
    step = max(1, PANEL // (n * D * max(D, Dv)))
    for c0 in range(0, count, step):
        c1 = min(c0 + step, count)
        w = found.weights[:, :, c0:c1] * found.inverse
        keys, values = heads.keys(block, c0, c1), heads.values(block, c0, c1)
        covariance.baddbmm_(w, (keys[..., :, None] * keys[..., None, :]).flatten(2))
        mixed.baddbmm_(w, (values[..., :, None] * keys[..., None, :]).flatten(2))
        value.baddbmm_(w, values)
    matrix = covariance.view(n, M, D, D) - found.mean[..., :, None] * found.mean[..., None, :]
    matrix.diagonal(dim1=-2, dim2=-1).add_(found.ridge)
    mixed = mixed.view(n, M, Dv, D) - value[..., :, None] * found.mean[..., None, :]
    return torch.linalg.solve(matrix, mixed.mT).mT


def _fits(inputs: Inputs, tol: float, limit: int) -> Iterator[tuple[Heads, Block, Fit]]:
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0:
        return
    space = Workspace(inputs.q, inputs.dtype)
    for heads, block in walk(inputs, 0, space):
        yield heads, block, fit(inputs, heads, block, tol, limit)


def _call(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    ridge: float | Tensor,
    ridge_mode: str,
    scale: float | Tensor | None,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    log_decay: Tensor | None,
    window: tuple[int, int] | None,
    tol: float | None,
    max_iters: int | None,
) -> forms.Call:
    sizes = checks.check_qkv(op, q, k, v)
    if tol is not None:
        checks.check_number(op, "tol", tol, least=0.0)
    if max_iters is not None:
        checks.check_integer(op, "max_iters", max_iters)
    tolerance = forms.TOLERANCE[q.dtype] if tol is None else tol
    call = forms.Call(
        q, k, v, causal, ridge, ridge_mode, scale, key_mask, key_bias, log_decay, window,
        tolerance, tolerance, max_iters or 0, 0, False,
    )
    forms.check(op, sizes, call)
    return call


def _inputs(call: forms.Call, dtype: torch.dtype | None = None) -> Inputs:
    q, k, v, ridge, scale, key_mask, key_bias, sums, first = forms.operands(call)
    if dtype is not None:
        q, k, v, ridge, scale = (x.to(dtype) for x in (q, k, v, ridge, scale))
    decay = None if sums is None else DecaySums(sums, first)
    window = call.window if call.window is not None else (-1, -1)
    absolute = call.ridge_mode == "absolute"
    return Inputs(
        q, k, v, ridge, scale, key_mask, key_bias, decay, call.causal, window, absolute
    )
