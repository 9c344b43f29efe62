"""A problem whose queries all see all keys, in tiles that stay in a processor's cache.

    S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   o_i = phi(q_i) S / divisor(phi(q_i) z)

`regard::linear_tiled_fwd` and `_bwd`. On whole tensors, as `encode_read` has it, features, the
column of ones and the division are passes through memory, into fresh pages each: more than the
products cost. Here q, k and v are read once and the output is written once.

With w_i the divisor and g_i = do_i / w_i, the gradient of phi(q_i) . z is -o_i . g_i (0 where the
divisor is clamped), and those of S and z are sums over the queries, like S and z over the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.core.precision import compute_dtype, without_autocast
from regard.ops.linear.problem import Problem, Solution, each_sequence
from regard.ops.linear.tiles import tiles


def _elu(x: Tensor) -> Tensor:
    return x.clamp(max=0.0).exp_().add_(x.clamp(min=0.0))


def _relu_gradient(x: Tensor, phi: Tensor, gradient: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, x, 0.0)  # 30 times faster than a mask


# By name: the map, and its gradient from x, phi(x) and a gradient that may be overwritten.
MAPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "identity": (lambda x: x, lambda x, phi, gradient: gradient),
    "relu": (torch.relu, _relu_gradient),
    "elu": (_elu, lambda x, phi, gradient: gradient.mul_(phi.clamp(max=1.0))),
}
NONE, SUM, CLAMP = range(3)  # the normaliser


def _divisor(sums: Tensor, normaliser: int, minimum: float) -> Tensor:
    if normaliser == SUM:
        return sums.masked_fill(sums == 0, 1.0)
    return sums.clamp(min=minimum)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor,
    query_map: str, key_map: str, scale: float, normaliser: int, minimum: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with without_autocast(q):
        (B, Hk, length, D), (_, H, T, _), E, dtype = k.shape, q.shape, v.shape[3], S.dtype
        S, z = (x.clone(memory_format=torch.contiguous_format) for x in (S, z))
        for tile in tiles(B, Hk, 1, length, max(D, E)):
            keys = MAPS[key_map][0](tile.tokens(k).to(dtype))
            tile.heads(S).baddbmm_(keys.mT, tile.tokens(v).to(dtype))
            if normaliser:
                tile.heads(z).add_(keys.sum(1))
        out = q.new_empty(B, H, T, E)
        grouped, rows = q.unflatten(1, (Hk, -1)), out.unflatten(1, (Hk, -1))
        for tile in tiles(B, Hk, H // Hk, T, max(D, E)):
            queries = MAPS[query_map][0](tile.tokens(grouped).to(dtype))
            room = tile.room(rows, dtype)
            found = torch.bmm(queries, tile.heads(S), out=room)
            if scale != 1.0:
                found.mul_(scale)
            if normaliser:
                sums = (queries @ tile.heads(z)[..., None]).mul_(scale)
                found.div_(_divisor(sums, normaliser, minimum))
            if room is None:
                tile.write(rows, found)
        return out, S, z


def _differentiate(
    d_out: Tensor, d_S: Tensor, d_z: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor,
    query_map: str, key_map: str, scale: float, normaliser: int, minimum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with without_autocast(q):
        (B, Hk, length, D), H, T, E, dtype = k.shape, *q.shape[1:3], v.shape[3], S.dtype
        S, z = S.contiguous(), z.contiguous()
        d_S, d_z = (x.clone(memory_format=torch.contiguous_format) for x in (d_S, d_z))
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        grouped, gradients, d_rows = (x.unflatten(1, (Hk, -1)) for x in (q, d_out, dq))
        for tile in tiles(B, Hk, H // Hk, T, max(D, E)):
            x = tile.tokens(grouped).to(dtype)
            queries = MAPS[query_map][0](x)
            part, product = tile.tokens(gradients).to(dtype), tile.heads(S)
            sums = None
            if normaliser:
                sums = (queries @ tile.heads(z)[..., None]).mul_(scale)
                part = part / _divisor(sums, normaliser, minimum)
            back = part @ product.mT
            if sums is not None:
                # <o, do> is read off the other side, <phi(q), S do>: no output is needed.
                lost = (queries * back).sum(2, keepdim=True).mul_(-scale)
                lost.div_(_divisor(sums, normaliser, minimum))
                if normaliser == CLAMP:
                    lost.masked_fill_(sums <= minimum, 0.0)
                back.baddbmm_(lost, tile.heads(z)[:, None])
                tile.heads(d_z).add_((queries.mT @ lost)[..., 0], alpha=scale)
            tile.heads(d_S).baddbmm_(queries.mT, part, alpha=scale)
            if scale != 1.0:
                back.mul_(scale)
            tile.write(d_rows, MAPS[query_map][1](x, queries, back))
        for tile in tiles(B, Hk, 1, length, max(D, E)):
            x, values = tile.tokens(k).to(dtype), tile.tokens(v).to(dtype)
            keys, product = MAPS[key_map][0](x), tile.heads(d_S)
            back = values @ product.mT
            if normaliser:
                back.add_(tile.heads(d_z)[:, None])
            tile.write(dk, MAPS[key_map][1](x, keys, back))
            tile.write(dv, keys @ product)
        return dq, dk, dv, d_S, d_z


def _fake(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, _, v, S, z = given[:5]
    return q.new_empty(*q.shape[:3], v.shape[3]), S.new_empty(S.shape), z.new_empty(z.shape)


def _fake_gradient(*given: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in given[3:8])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output[1:])


def _backward_of_forward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    found = _backward(*gradients, *ctx.saved_tensors, *ctx.options)
    return *found, None, None, None, None, None


_OPTIONS = "str query_map, str key_map, float scale, int normaliser, float minimum"
_backward = define(
    "linear_tiled_bwd",
    "(Tensor d_out, Tensor d_S, Tensor d_z, Tensor q, Tensor k, Tensor v, Tensor S, Tensor z, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _differentiate,
    _fake_gradient,
    vmap=batched(lambda *given: _backward(*given)),
)
_forward = define(
    "linear_tiled_fwd",
    f"(Tensor q, Tensor k, Tensor v, Tensor S, Tensor z, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _attend,
    _fake,
    backward=_backward_of_forward,
    setup_context=_save,
    vmap=batched(lambda *given: _forward(*given)),
)


def refuse(problem: Problem) -> str | None:
    """Why tiles do not serve a problem, or None."""
    if problem.q.device.type not in ("cpu", "meta"):
        return "its tiles fit the cache of a CPU"
    return refuse_operands(problem, MAPS)


def refuse_operands(problem: Problem, maps: Collection[str]) -> str | None:
    """Why a form that forms one state for all queries, with these maps, cannot, or None."""
    if problem.causal:
        return "causal: every query reads a state of its own"
    for name in ("log_decay", "beta", "key_mask", "chunk"):
        if getattr(problem, name) is not None:
            return f"it takes no {'chunk_size' if name == 'chunk' else name}"
    if isinstance(problem.scale, Tensor):
        return "one scale for all heads only"
    if problem.epsilon:
        return "nothing is added to its divisor"
    unknown = {problem.query_map.name, problem.key_map.name} - set(maps)
    return f"it knows no feature map {', '.join(sorted(unknown))}" if unknown else None


def _solve(problem: Problem) -> Solution:
    q, k, v, S, z = problem.q, problem.k, problem.v, problem.S, problem.z
    dtype, (B, Hk, _, D) = compute_dtype(q.dtype), k.shape
    if S is None:
        S = k.new_zeros(B, Hk, D, v.shape[3], dtype=dtype)
    if z is None:
        z = k.new_zeros(B, Hk, D, dtype=dtype)
    minimum, scale = problem.minimum, problem.scale
    normaliser = NONE if problem.normaliser is None else SUM if minimum is None else CLAMP
    out, S, z = _forward(
        q, k, v, S, z, problem.query_map.name, problem.key_map.name,
        1.0 if scale is None else float(scale), normaliser, minimum or 0.0,
    )  # fmt: skip
    return Solution(out, S, z if normaliser else None)


solve = each_sequence(_solve)
