"""Every query sees all keys, in tiles that stay in cache: `regard::inline_tiled_fwd` and `_bwd`.

    S = sum_j (k_j - m) (v_j - u)^T,    o_i = u + (scale / n) S^T phi(q_i)

Moments of tiles are joined as they come (Chan et al., 1979), so keys and values are read once and
no centred copy of them is written; on whole tensors that costs five passes through memory, which
is more than the products do. It is a loop of its own because the engine's sums know no means.

With A the gradient of S, out of (scale / n) sum_i phi(q_i) do_i^T, and Y = sum_i do_i:

    dphi(q_i) = (scale / n) S do_i,    dphi(k_j) = A (v_j - u),    dv_j = A^T (k_j - m) + Y / n
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.core.precision import compute_dtype, without_autocast
from regard.ops.inline.features import FEATURE_MAPS, differentiate
from regard.ops.linear.tiles import tiles


def _sums(k: Tensor, v: Tensor, feature_map: str) -> tuple[Tensor, Tensor, Tensor]:
    """S [B, Hk, D, E] and the means [B, Hk, D], [B, Hk, E] of all keys."""
    (B, Hk, S, D), E, dtype = k.shape, v.shape[3], compute_dtype(k.dtype)
    product = k.new_zeros(B, Hk, D, E, dtype=dtype)
    k_mean, v_mean = (k.new_zeros(B, Hk, size, dtype=dtype) for size in (D, E))
    for tile in tiles(B, Hk, 1, S, max(D, E)):
        keys = FEATURE_MAPS[feature_map](tile.tokens(k).to(dtype))
        values = tile.tokens(v).to(dtype)
        m, before = tile.t1 - tile.t0, tile.t0
        whole, keys_so_far, values_so_far = map(tile.heads, (product, k_mean, v_mean))
        own = keys.mean(1)
        whole.baddbmm_((keys - own[:, None]).mT, values)
        k_shift, v_shift = own - keys_so_far, values.mean(1) - values_so_far
        if before:
            weight = before * m / (before + m)
            whole.baddbmm_(k_shift[:, :, None], v_shift[:, None], alpha=weight)
        keys_so_far.add_(k_shift, alpha=m / (before + m))
        values_so_far.add_(v_shift, alpha=m / (before + m))
    return product, k_mean, v_mean


def _attend(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        (B, Hk, S, D), (_, H, T, _), E = k.shape, q.shape, v.shape[3]
        product, k_mean, v_mean = _sums(k, v, feature_map)
        out, share = q.new_empty(B, H, T, E), scale / max(S, 1)
        grouped, rows = q.unflatten(1, (Hk, -1)), out.unflatten(1, (Hk, -1))
        for tile in tiles(B, Hk, H // Hk, T, max(D, E)):
            queries = FEATURE_MAPS[feature_map](tile.tokens(grouped).to(product.dtype))
            mean, room = tile.heads(v_mean)[:, None], tile.room(rows, product.dtype)
            found = torch.baddbmm(mean, queries, tile.heads(product), alpha=share, out=room)
            if room is None:
                tile.write(rows, found)
        return out, product, k_mean, v_mean


def _differentiate(
    d_out: Tensor,
    d_product: Tensor,
    d_k_mean: Tensor,
    d_v_mean: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    product: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(q):
        (B, Hk, S, D), (_, H, T, _), E = k.shape, q.shape, v.shape[3]
        dtype, phi, share = product.dtype, FEATURE_MAPS[feature_map], scale / max(S, 1)
        product = product.contiguous()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        A = d_product.clone(memory_format=torch.contiguous_format)
        Y = d_v_mean.clone(memory_format=torch.contiguous_format)
        grouped, gradients, d_rows = (x.unflatten(1, (Hk, -1)) for x in (q, d_out, dq))
        for tile in tiles(B, Hk, H // Hk, T, max(D, E)):
            x, gradient = tile.tokens(grouped).to(dtype), tile.tokens(gradients).to(dtype)
            features = phi(x)
            tile.heads(A).baddbmm_(features.mT, gradient, alpha=share)
            tile.heads(Y).add_(gradient.sum(1))
            back = (gradient @ tile.heads(product).mT).mul_(share)
            tile.write(d_rows, differentiate(feature_map, x, features, back))
        d_k_mean, Y = (d_k_mean / max(S, 1)).contiguous(), Y / max(S, 1)
        for tile in tiles(B, Hk, 1, S, max(D, E)):
            x, values = tile.tokens(k).to(dtype), tile.tokens(v).to(dtype)
            features, own = phi(x), tile.heads(A)
            back = torch.baddbmm(
                tile.heads(d_k_mean)[:, None], values - tile.heads(v_mean)[:, None], own.mT
            )
            tile.write(dk, differentiate(feature_map, x, features, back))
            centred = features - tile.heads(k_mean)[:, None]
            tile.write(dv, torch.baddbmm(tile.heads(Y)[:, None], centred, own))
        return dq, dk, dv


def _fake(q: Tensor, k: Tensor, v: Tensor, feature_map: str, scale: float) -> tuple[Tensor, ...]:
    (B, Hk, _, D), E, dtype = k.shape, v.shape[3], compute_dtype(q.dtype)
    sums = (k.new_empty(B, Hk, *size, dtype=dtype) for size in ((D, E), (D,), (E,)))
    return q.new_empty(*q.shape[:3], E), *sums


def _fake_gradient(*given: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in given[4:7])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.feature_map, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward_of_forward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    found = _backward(*gradients, *ctx.saved_tensors, ctx.feature_map, ctx.scale)
    return *found, None, None


_OPTIONS = "str feature_map, float scale"
_backward = define(
    "inline_tiled_bwd",
    "(Tensor d_out, Tensor d_product, Tensor d_k_mean, Tensor d_v_mean, Tensor q, Tensor k, "
    f"Tensor v, Tensor product, Tensor k_mean, Tensor v_mean, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _differentiate,
    _fake_gradient,
    vmap=batched(lambda *given: _backward(*given)),
)
_forward = define(
    "inline_tiled_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attend,
    _fake,
    backward=_backward_of_forward,
    setup_context=_save,
    vmap=batched(lambda *given: _forward(*given)),
)


def tiled(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output in q's dtype; S and the means of keys and values, float32 (64 for float64).

    q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, E]. O((T + S) D E) time; it keeps its inputs and
    these moments for the backward pass. Raises on double backward.
    """
    return _forward(q, k, v, feature_map, scale)
