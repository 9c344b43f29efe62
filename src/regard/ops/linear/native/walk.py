"""The walk over the tokens as a pair of torch operators, `regard::linear_native_fwd` and `_bwd`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.native import chosen, no_memory
from regard.ops.linear.native.library import OPERANDS, Call, Map, kernel, operand, pointer

OP = "linear_attention"
# Numbers in all states times tokens from which a second thread is worth its start: a millisecond.
LEAST_WORK = 1 << 25


class Walked(NamedTuple):
    """out [B, H, T, E], S [B, Hk, F, E]; with a normaliser weight [B, H, T] and z [B, Hk, F]."""

    out: Tensor
    weight: Tensor
    S: Tensor
    z: Tensor


Operands = tuple[Tensor | None, ...]
# What calls C once more: operands and weights of maps -> the output, S and z.
Planned = Callable[[Operands, Operands], tuple[Tensor, Tensor | None, Tensor | None]]


def walk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, minimum: float, epsilon: float,
) -> Walked:  # fmt: skip
    """The causal recurrence on features, query t at key t, and what is left after the last one.

    q [B, H, T, F], k [B, Hk, T, F], v [B, Hk, T, E]; log_decay [B, Hk, T] or [B, Hk, T, F],
    beta [B, Hk, T] for the delta rule, S [B, Hk, F, E], z [B, Hk, F]; all float32 but log_decay,
    of any floating dtype. O(T F E) time, O(T (F + E)) memory, the backward pass included.
    """
    return Walked(*_forward(q, k, v, log_decay, beta, S, z, normaliser, minimum, epsilon))


def _ready(x: Tensor | None) -> Tensor | None:
    """float32 with a contiguous last axis."""
    if x is None:
        return None
    x = x.detach().to(torch.float32)
    return x if x.dim() < 4 or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _call(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, minimum: float, epsilon: float,
) -> tuple[Call, list[Tensor | None]]:  # fmt: skip
    """All but the results of a call, and the tensors that must live as long as it does."""
    kept = [_ready(x) for x in (q, k, v, log_decay, beta)] + [_whole(S), _whole(z)]
    (B, H, T, F), (_, Hk, _, E) = q.shape, v.shape
    call = Call(
        batch=B, heads=H, key_heads=Hk, tokens=T, features=F, channels=E,
        per_channel=log_decay is not None and log_decay.dim() == 4, normaliser=normaliser,
        threads=torch.get_num_threads() if B * H * T * F * E >= LEAST_WORK else 1,
        minimum=minimum, epsilon=epsilon,
        q=operand(kept[0]), k=operand(kept[1]), v=operand(kept[2]), log_decay=operand(kept[3]),
        beta=operand(kept[4]), state=pointer(kept[5]), total=pointer(kept[6]),
    )  # fmt: skip
    return call, kept


def _run(name: str, call: Call) -> None:
    if kernel(OP, name, chosen())(ctypes.byref(call)):
        raise no_memory(OP)


def _results(
    q: Tensor, k: Tensor, v: Tensor, normaliser: int, features: int | None = None
) -> Walked:
    (B, H, T, F), (_, Hk, _, E) = q.shape, v.shape
    F = F if features is None else features
    return Walked(
        q.new_empty(B, H, T, E),
        q.new_empty((B, H, T) if normaliser else 0),
        q.new_empty(B, Hk, F, E),
        q.new_empty((B, Hk, F) if normaliser else 0),
    )


def _fake_walk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, minimum: float, epsilon: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_results(q, k, v, normaliser))


def walk_mapped(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, minimum: float, epsilon: float,
    features: int, maps: tuple[Map, Map],
) -> Walked:  # fmt: skip
    """`walk` on queries and keys as they are, which become `features` wide inside; no gradients.

    It calls C directly: for tensors that no tracer or transform follows.
    """
    results = _results(q, k, v, normaliser, features)
    operands = (q, k, v, log_decay, beta, S, z, normaliser, minimum, epsilon)
    return _run_walk(operands, results, features, maps)


def planned(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, minimum: float, epsilon: float,
    features: int, maps: tuple[Map, Map], wants_state: bool, isa: str | None,
) -> Planned | None:  # fmt: skip
    """What `walk_mapped` does, for any operands of these sizes and strides.

    It takes the seven operands and the weights of both maps, None for what there is not, and
    brings S and z where `wants_state`. None where these operands would have to be copied.
    """
    given = (q, k, v, log_decay, beta, S, z)
    call, kept = _call(*given, normaliser, minimum, epsilon)
    if any(x is not None and _is_copy(x, y) for x, y in zip(given, kept, strict=True)):
        return None
    call.features, (call.query_map, call.key_map) = features, maps
    ready, run_kernel = bytes(call), kernel(OP, "walk", isa)
    large = q.numel() * v.shape[3] >= LEAST_WORK
    (B, H, T, _), (_, Hk, _, E) = q.shape, v.shape
    of_out, of_S = (B, H, T, E), (B, Hk, features, E) if wants_state else None
    of_weight, of_z = ((B, H, T), (B, Hk, features)) if normaliser else (None, None)

    def run(given: Operands, weights: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        q, S, z = given[0], *given[5:]
        assert q is not None
        out, weight, last, total = q.new_empty(of_out), None, None, None
        if of_weight is not None:
            weight = q.new_empty(of_weight)
        if of_S is not None:
            last = q.new_empty(of_S)
            total = None if of_z is None else q.new_empty(of_z)
        call = Call.from_buffer_copy(ready)
        if large:
            call.threads = torch.get_num_threads()
        for name, x in zip(OPERANDS, given, strict=False):
            if x is not None:
                getattr(call, name).data = x.data_ptr()
        for map, x in zip((call.query_map, call.key_map), weights, strict=True):
            if x is not None:
                map.weight = x.data_ptr()
        call.state, call.total, call.out = pointer(S), pointer(z), out.data_ptr()
        call.weight, call.last_state, call.last_total = (
            pointer(weight), pointer(last), pointer(total)
        )  # fmt: skip
        if run_kernel(ctypes.byref(call)):
            raise no_memory(OP)
        return out, last, total

    return run


def _is_copy(x: Tensor, y: Tensor | None) -> bool:
    return y is None or x.data_ptr() != y.data_ptr() or x.dtype != y.dtype


def _walk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, minimum: float, epsilon: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    results = _results(q, k, v, normaliser)
    operands = (q, k, v, log_decay, beta, S, z, normaliser, minimum, epsilon)
    return tuple(_run_walk(operands, results, q.shape[3]))


def _run_walk(
    operands: tuple[Any, ...], results: Walked, features: int, maps: tuple[Map, Map] | None = None
) -> Walked:
    call, kept = _call(*operands)
    call.features = features
    if maps is not None:
        call.query_map, call.key_map = maps
    call.out, call.last_state = results.out.data_ptr(), results.S.data_ptr()
    if call.normaliser:
        call.weight, call.last_total = results.weight.data_ptr(), results.z.data_ptr()
    _run("walk", call)
    del kept
    return results


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    S: Tensor | None, z: Tensor | None, normaliser: int, wants_decay: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Room for them, in the order of the operands; no element for what there is not."""

    def like(x: Tensor | None, there: bool = True) -> Tensor:
        return q.new_empty(x.shape if x is not None and there else 0)

    return (
        like(q), like(k), like(v), like(log_decay, wants_decay), like(beta), like(S),
        like(z, normaliser > 0),
    )  # fmt: skip


def _fake_differentiate(
    d_out: Tensor, d_S: Tensor, d_z: Tensor, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, S: Tensor | None, z: Tensor | None,
    out: Tensor, weight: Tensor, normaliser: int, minimum: float, epsilon: float,
    wants_decay: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _gradients(q, k, v, log_decay, beta, S, z, normaliser, wants_decay)


def _differentiate(
    d_out: Tensor, d_S: Tensor, d_z: Tensor, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, S: Tensor | None, z: Tensor | None,
    out: Tensor, weight: Tensor, normaliser: int, minimum: float, epsilon: float,
    wants_decay: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = _gradients(q, k, v, log_decay, beta, S, z, normaliser, wants_decay)
    call, kept = _call(q, k, v, log_decay, beta, S, z, normaliser, minimum, epsilon)
    if d_out.shape[2] and d_out.stride()[2:] == (0, 0):  # of a plain sum: one row for all tokens
        d_out = d_out[:, :, :1].contiguous().expand_as(d_out)
    given = [_ready(d_out), _whole(weight), _whole(d_S), _whole(d_z)]
    call.d_out, call.d_last_state = operand(given[0]), pointer(given[2])
    if normaliser:
        given.append(_ready(out))
        call.given_out = operand(given[4])
        call.given_weight, call.d_last_total = pointer(given[1]), pointer(given[3])
    names = ("dq", "dk", "dv", "d_log_decay", "d_beta", "d_state", "d_total")
    for name, gradient in zip(names, found, strict=True):
        if gradient.numel():
            setattr(call, name, gradient.data_ptr())
    _run("gradient", call)
    del kept, given
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normaliser, ctx.minimum, ctx.epsilon = inputs
    ctx.mark_non_differentiable(output[1])
    out, weight = output[:2]
    # Only the slope of the weights needs the output.
    ctx.save_for_backward(*tensors, out if ctx.normaliser else out.new_empty(0), weight)


def _backward_of_forward(
    ctx: Any, d_out: Tensor, d_weight: Tensor, d_S: Tensor, d_z: Tensor
) -> tuple[Any, ...]:
    saved, wants = ctx.saved_tensors, ctx.needs_input_grad
    options = ctx.normaliser, ctx.minimum, ctx.epsilon
    found = _backward(d_out, d_S, d_z, *saved, *options, wants[3])
    gradients = [
        gradient.to(x.dtype) if x is not None and wanted else None
        for gradient, x, wanted in zip(found, saved, wants, strict=False)
    ]
    return *gradients, None, None, None


_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? S, Tensor? z"
_OPTIONS = "int normaliser, float minimum, float epsilon"

_backward = define(
    "linear_native_bwd",
    f"(Tensor d_out, Tensor d_S, Tensor d_z, {_OPERANDS}, Tensor out, Tensor weight, {_OPTIONS}, "
    "bool wants_decay) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _differentiate,
    _fake_differentiate,
    vmap=batched(lambda *given: _backward(*given)),
)
_forward = define(
    "linear_native_fwd",
    f"({_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _walk,
    _fake_walk,
    backward=_backward_of_forward,
    setup_context=_save,
    vmap=batched(lambda *given: _forward(*given)),
)
