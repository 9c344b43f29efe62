"""The eager form as a pair of torch operators, whose shapes do not depend on the plan's values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard.core.library import define
from regard.ops.block_sparse import eager
from regard.ops.block_sparse.lists import Reach, from_blocks, from_levels
from regard.ops.block_sparse.pyramid import Layout
from regard.ops.linear.mapped import batched

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor plan, bool indices, int block_q, "
    "int block_k, int S, int left, int right, bool replicate"
)


def _walk(
    q: Tensor, plan: Tensor, indices: bool, block_q: int, block_k: int, S: int, left: int,
    right: int, replicate: bool,
) -> tuple[eager.Walk, tuple[int, int]]:  # fmt: skip
    layout, reach = Layout(S, block_k, replicate), Reach(q.shape[2], S, left, right)
    make = from_blocks if indices else from_levels
    lists = make(plan, block_q, layout, reach)
    room = min(plan.shape[3] * block_k, S) if indices else 0
    walk = eager.Walk(lists, block_q, layout, reach, plan.shape[2], room)
    return walk, (plan.shape[0], plan.shape[1])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    return eager.forward(q, k, v, bias, *_walk(q, plan, *settings))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, plan: Tensor, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return eager.backward(d_out, q, k, v, bias, out, lse, *_walk(q, plan, *settings))


def _fake_backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = q.shape, k.shape, v.shape, (0,) if bias is None else bias.shape
    return tuple(q.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]


def _differentiate(ctx: Any, d_out: Tensor, _: Any) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    *found, d_bias = _gradient(d_out, out, lse, *inputs, *ctx.settings)
    if inputs[3] is None:
        d_bias = None
    return *found, d_bias, None, *(None for _ in ctx.settings)


_gradient = define(
    "block_sparse_bwd",
    f"(Tensor d_out, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    vmap=batched(lambda *given: _gradient(*given)),
)
block_sparse = define(
    "block_sparse_fwd",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_differentiate,
    setup_context=_save,
    vmap=batched(lambda *given: block_sparse(*given)),
)
