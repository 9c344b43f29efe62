"""The Triton form as a pair of torch operators, whose shapes do not depend on a plan's values.

torch's way to an operator that Python implements, and back for its gradient, takes longer than many
a kernel. `attention` goes it where somebody looks on, and straight to the kernels otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.core.watched import PLAIN, is_watched

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? plan, Tensor? scales, bool indices, "
    "int block_q, int block_k, int left, int right, float scale"
)
_TENSORS = 6


def _where(q: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: that of the operands, then."""
    if q.device.type != "cuda" or q.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(q.device)


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    from regard.ops.block_sparse.triton import launch

    q, k, v, bias, plan, scales, *settings = given
    with _where(q):
        return launch.forward(q, k, v, bias, plan, scales, launch.Settings(*settings))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(d_out: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
    from regard.ops.block_sparse.triton import launch

    q, k, v, bias, plan, scales, *settings, of_bias = given
    with _where(d_out):
        return launch.backward(
            d_out, out, lse, q, k, v, bias, plan, scales, launch.Settings(*settings), of_bias
        )


def _fake_backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_bias = rest[-1] and bias is not None
    d_bias = q.new_empty(k.shape[:3] if of_bias else (0,), dtype=torch.float32)
    return *(q.new_empty(x.shape) for x in (q, k, v)), d_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.settings = inputs[_TENSORS:]


def _differentiate(ctx: Any, d_out: Tensor, _: Any) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    bias, of_bias = inputs[3], ctx.needs_input_grad[3]
    # With gradients on, somebody wants to differentiate once more: the operator refuses.
    gradient = _gradient if torch.is_grad_enabled() or not _unseen(inputs) else _backward
    *found, d_bias = gradient(d_out, out, lse, *inputs, *ctx.settings, of_bias)
    if bias is None or not of_bias:
        d_bias = None
    elif bias.shape[1] == 1:
        d_bias = d_bias.sum(1, keepdim=True)
    return *found, d_bias, None, None, *(None for _ in ctx.settings)


_gradient = define(
    "block_sparse_triton_bwd",
    f"(Tensor d_out, Tensor out, Tensor lse, {_ARGUMENTS}, bool of_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    vmap=batched(lambda *given: _gradient(*given)),
)
block_sparse_triton = define(
    "block_sparse_triton_fwd",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_differentiate,
    setup_context=_save,
    vmap=batched(lambda *given: block_sparse_triton(*given)),
)


class _Attention(torch.autograd.Function):
    """`block_sparse_triton` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        out, lse = _forward(*given)
        ctx.save_for_backward(*given[:_TENSORS], out, lse)
        ctx.settings = given[_TENSORS:]
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return _differentiate(ctx, d_out, None)


_PLAIN = PLAIN | {type(None)}


def _unseen(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing but these tensors' numbers matters: nobody traces, maps or looks on."""
    return not is_watched() and _PLAIN.issuperset(map(type, tensors))


def attention(*given: Any) -> Tensor:
    """The output of `block_sparse_triton`, by the shorter way where there is one."""
    tensors = given[:_TENSORS]
    if not _unseen(tensors):
        return block_sparse_triton(*given)[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(*given)
    return _forward(*given)[0]
