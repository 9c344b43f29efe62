"""Looking into a fit: its signed weights, and the local slope of values over keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.core import checks
from regard.core.precision import compute_dtype
from regard.ops.local_linear import forms
from regard.ops.local_linear.blockwise import Fit, fits, signed
from regard.ops.local_linear.kernel import as_dot
from regard.ops.local_linear.layout import Block, Inputs
from regard.ops.local_linear.registered import inputs_of
from regard.ops.local_linear.solve import Solver, wants_precision
from regard.ops.local_linear.tiles import PANEL, Heads


def local_linear_weights(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    *,
    causal: bool = False,
    ridge: float | Tensor = 1.0,
    ridge_mode: Literal["relative", "absolute"] = "relative",
    scale: float | Tensor | None = None,
    kernel: Literal["dot", "gaussian"] = "dot",
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    intercept: bool = True,
    covariance_block: int | None = None,
    window: tuple[int, int] | None = None,
    solver: Literal["auto", "direct", "cg"] = "auto",
    tol: float | None = None,
    max_iters: int | None = None,
) -> Float[Tensor, "b h t s"]:
    """The signed weights with which local linear attention sums the values.

    With the symbols of `local_linear_attention`,

        weights_ij = p_ij (1 - g_i . (k_j - kbar_i)),    out = weights @ v.

    Rows sum to 1 (to 0 where no key is seen), however few iterations the solver made; single
    weights may be negative or above 1, which is how the fit extrapolates. Without an intercept
    they are -p_ij g_i . k_j and sum to anything.

    Arguments:
        q: queries [B, H, T, D].
        k: keys [B, Hk, S, D].
        Others: as for `local_linear_attention`.

    Returns:
        [B, H, T, S] in float32, or float64 for float64 inputs.

    Precision:
        That of the attention: float32 or float64 arithmetic, the solver's tolerance.

    Cost:
        That of the attention, and O(T S) memory for the result.

    Source:
        Zuo et al. 2025, arXiv 2510.01450, in the centred form.

    Limits:
        No gradients.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or domain.

    >>> import torch
    >>> x = torch.randn(1, 1, 5, 3)
    >>> weights = local_linear_weights(x, x, causal=True)
    >>> weights.shape, torch.allclose(weights.sum(-1), torch.ones(5))
    (torch.Size([1, 1, 5, 5]), True)
    """
    op = "local_linear_weights"
    checks.check_qkv(op, q, k, k)
    call = _call(
        op, q, k, k, tol, causal=causal, ridge=ridge, ridge_mode=ridge_mode, scale=scale,
        kernel=kernel, key_mask=key_mask, key_bias=key_bias, log_decay=log_decay,
        intercept=intercept, covariance_block=covariance_block, window=window, solver=solver,
        max_iters=max_iters,
    )
    with torch.no_grad():
        inputs = _inputs(call)
        B, H, T, D = q.shape
        weights = torch.zeros(B, H, T, k.shape[2], dtype=inputs.dtype, device=q.device)
        direct = forms.takes_direct(call)
        precise = wants_precision(direct, call.tol)
        how = Solver(direct, call.tol, call.max_iters or 2 * D + 8, precise)
        for heads, block, found, only in fits(inputs, how, 0):
            for c0, c1 in block.tiles():
                target = weights[..., block.low + c0 : block.low + c1]
                tile = signed(heads, block, found, c0, c1) * found.inverse
                heads.put(target, block, tile, only)
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
    kernel: Literal["dot", "gaussian"] = "dot",
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, "b heads s"] | None = None,
    log_decay: Float[Tensor, "b heads s"] | None = None,
    intercept: bool = True,
    window: tuple[int, int] | None = None,
) -> Float[Tensor, "b h t dv d"]:
    """The slope of the affine map that local linear attention fits around each query.

    With p = softmax of the scores, and averages and covariances under it,

        W_i = Cov_p(v, k) (Cov_p(k, k) + lambda I)^-1,    out_i = vbar_i + W_i (q_i - kbar_i).

    It is the derivative of the output along the query with the weights held fixed: what a value
    gains per unit of key, near this query. A query that sees no key, or one key only, has slope
    0; so has one whose own system is singular even to float64, where the attention returns the
    local average. Without an intercept second moments take the place of covariances and
    out_i = W_i q_i.

    Arguments:
        q, k, v: queries [B, H, T, D], keys [B, Hk, S, D], values [B, Hk, S, Dv].
        Others: as for `local_linear_attention`.

    Returns:
        [B, H, T, Dv, D] in float32, or float64 for float64 inputs.

    Precision:
        Computed in float64 by a direct solve.

    Cost:
        O(T S D (D + Dv) + T D^3); memory O(T D Dv) for the result.

    Source:
        Zuo et al. 2025, arXiv 2510.01450; the closed form of the fit's matrix.

    Limits:
        No gradients.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or domain.

    >>> import torch
    >>> k = torch.randn(1, 1, 50, 2)
    >>> v = k @ torch.tensor([[1.0], [-2.0]])
    >>> local_linear_slope(k[:, :, :1], k, v, ridge=1e-9)[0, 0, 0].round(decimals=4)
    tensor([[ 1., -2.]])
    """
    op = "local_linear_slope"
    checks.check_qkv(op, q, k, v)
    call = _call(
        op, q, k, v, None, causal=causal, ridge=ridge, ridge_mode=ridge_mode, scale=scale,
        kernel=kernel, key_mask=key_mask, key_bias=key_bias, log_decay=log_decay,
        intercept=intercept, window=window,
    )
    with torch.no_grad():
        q64, k64, v64 = (x.detach().double() for x in (q, k, v))
        inputs = _inputs(replace(call, q=q64, k=k64, v=v64))
        B, H, T, D = q.shape
        kind = compute_dtype(q.dtype)
        slope = torch.zeros(B, H, T, v.shape[3] * D, dtype=kind, device=q.device)
        solver = Solver(True, 0.0, 1)
        for heads, block, found, _ in fits(inputs, solver, 0):
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
    # Without an intercept the mean is 0 and nothing is taken off.
    matrix = covariance.view(n, M, D, D) - found.mean[..., :, None] * found.mean[..., None, :]
    matrix.diagonal(dim1=-2, dim2=-1).add_(found.ridge)
    mixed = mixed.view(n, M, Dv, D) - value[..., :, None] * found.mean[..., None, :]
    slope = torch.linalg.solve_ex(matrix, mixed.mT)[0].mT
    # The attention's own verdict on each row: a residual of 1 is a fit that was given up.
    sound = (found.residual < 1)[..., None] & slope.isfinite().all((-2, -1), keepdim=True)
    return torch.where(sound, slope, 0.0)


def _call(
    op: str, q: Tensor, k: Tensor, v: Tensor, tol: float | None, **arguments: Any
) -> forms.Call:
    """The checked call of these arguments of `local_linear_attention`."""
    if tol is not None:
        checks.check_number(op, "tol", tol, least=0.0)
    if arguments.get("max_iters") is not None:
        checks.check_integer(op, "max_iters", arguments["max_iters"])
    arguments["max_iters"] = arguments.get("max_iters") or 0
    tol = forms.TOLERANCE[q.dtype] if tol is None else tol
    call = forms.Call(q, k, v, tol=tol, tol_backward=tol, **arguments)
    forms.check(op, checks.check_qkv(op, q, k, v), call)
    return call


def _inputs(call: forms.Call) -> Inputs:
    dot = as_dot(call) if call.kernel == "gaussian" else call
    return inputs_of(forms.operands(dot), forms.options(call))
