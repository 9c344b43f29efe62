"""The forms as torch operators, whose shapes do not depend on the plan's values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard.core.attention_pair import attention_pair
from regard.ops.block_sparse import eager
from regard.ops.block_sparse.lists import (
    Reach,
    check_blocks,
    check_levels,
    from_blocks,
    from_levels,
)
from regard.ops.block_sparse.native import walk
from regard.ops.block_sparse.pyramid import Layout

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor plan, bool indices, int block_q, "
    "int block_k, int S, int left, int right, bool replicate"
)
_OP = "block_sparse_attention"


def _walk(
    q: Tensor, plan: Tensor, indices: bool, block_q: int, block_k: int, S: int, left: int,
    right: int, replicate: bool,
) -> tuple[eager.Walk, tuple[int, int]]:  # fmt: skip
    layout, reach = Layout(S, block_k, replicate), Reach(q.shape[2], S, left, right)
    make = from_blocks if indices else from_levels
    lists = make(plan, block_q, layout, reach)
    room = min(plan.shape[3] * block_k, S) if indices else 0
    walked = eager.Walk(lists, block_q, layout, reach, plan.shape[2], room)
    return walked, (plan.shape[0], plan.shape[1])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    return eager.forward(q, k, v, bias, *_walk(q, plan, *settings))


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, plan: Tensor, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return eager.backward(d_out, q, k, v, bias, out, lse, *_walk(q, plan, *settings))


def _native_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Tensor, indices: bool,
    block_q: int, block_k: int, S: int, left: int, right: int, replicate: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists = walk.of_plan(q, k.shape[2], plan, indices, block_q, block_k, S, left, right, replicate)
    found = walk.forward(_OP, q, k, v, bias, lists, scale)
    if found is None:
        check = check_blocks if indices else check_levels
        check(plan, Layout(S, block_k, replicate))
        raise AssertionError("the kernel has found a value of the plan that is none")
    return found


def _native_backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, plan: Tensor, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *rest, scale = settings
    lists = walk.of_plan(q, k.shape[2], plan, *rest)
    return walk.backward(_OP, d_out, out, lse, q, k, v, bias, lists, scale)


block_sparse = attention_pair("block_sparse", _ARGUMENTS, _forward, _backward, gradients=4)
block_sparse_native = attention_pair(
    "block_sparse_native", f"{_ARGUMENTS}, float scale", _native_forward, _native_backward,
    gradients=4,
)  # fmt: skip
