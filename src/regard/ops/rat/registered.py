"""`regard::rat_scan…` and `regard::rat_attend…`: both steps of RAT as pairs of operators.

Every form brings four functions; fakes, autograd and vmap are written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.core.precision import without_autocast
from regard.ops.rat import attend, scan
from regard.ops.rat.attend import Inputs

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor? past_count, "
    "Tensor? place, Tensor? cosine, Tensor? sine, float scale, int chunk, int offset"
)


def register_scan(
    name: str, run: Callable[..., Tensor], differentiate: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    """`regard::<name>_fwd(x, gate, carry, chunk)`, and its backward."""

    def fwd(x: Tensor, gate: Tensor, carry: Tensor, chunk: int) -> Tensor:
        with without_autocast(x):
            return run(x, gate, carry, chunk)

    def bwd(
        grad: Tensor, h: Tensor, x: Tensor, gate: Tensor, carry: Tensor, chunk: int
    ) -> tuple[Tensor, ...]:
        with without_autocast(x):
            return differentiate(grad, h, x, gate, carry, chunk)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gate, carry, ctx.chunk = inputs
        ctx.save_for_backward(output, x, gate, carry)

    def backward_of(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *backward(grad, *ctx.saved_tensors, ctx.chunk), None

    def mapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        (h,), (axis,) = batched(lambda *folded: (forward(*folded),))(info, in_dims, *args)
        return h, axis

    backward = define(
        f"{name}_bwd",
        "(Tensor grad, Tensor h, Tensor x, Tensor gate, Tensor carry, int chunk)"
        " -> (Tensor, Tensor, Tensor)",
        bwd,
        lambda grad, h, x, gate, carry, chunk: tuple(y.new_empty(y.shape) for y in (x, x, carry)),
        vmap=batched(lambda *given: backward(*given)),
    )
    forward = define(
        f"{name}_fwd",
        "(Tensor x, Tensor gate, Tensor carry, int chunk) -> Tensor",
        fwd,
        lambda x, gate, carry, chunk: x.new_empty(x.shape),
        backward=backward_of,
        setup_context=save,
        vmap=mapped,
    )
    return forward


def register_attend(
    name: str,
    run: Callable[[Inputs], tuple[Tensor, Tensor]],
    differentiate: Callable[[Inputs, Tensor, Tensor, Tensor], tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`regard::<name>_fwd(the fields of Inputs)` -> (out, lse), and its backward."""

    def fwd(*given: Any) -> tuple[Tensor, Tensor]:
        with without_autocast(given[0]):
            return run(Inputs(*given))

    def bwd(grad: Tensor, out: Tensor, lse: Tensor, *given: Any) -> tuple[Tensor, ...]:
        with without_autocast(grad):
            return differentiate(Inputs(*given), grad, out, lse)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs[:9])
        ctx.options = inputs[9:]

    def backward_of(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        return *backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7

    backward = define(
        f"{name}_bwd",
        f"(Tensor grad, Tensor out, Tensor lse, {_OPERANDS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        bwd,
        lambda grad, out, lse, *given: tuple(y.new_empty(y.shape) for y in given[:5]),
        vmap=batched(lambda *given: backward(*given)),
    )
    forward = define(
        f"{name}_fwd",
        f"({_OPERANDS}) -> (Tensor, Tensor)",
        fwd,
        lambda q, *given: (q.new_empty(q.shape), q.new_empty(q.shape[:3])),
        backward=backward_of,
        setup_context=save,
        vmap=batched(lambda *given: forward(*given)),
    )
    return forward


scan_eager = register_scan("rat_scan", scan.forward, scan.backward)
attend_eager = register_attend("rat_attend", attend.forward, attend.backward)
