"""Every query reads the state after all keys: `regard::linear_whole_native_fwd` and `_bwd`.

    S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   o_i = phi(q_i) S / divisor(phi(q_i) z)

or, `centred`, sums of keys and values about their means (see `whole.c`). Maps are applied tile by
tile: q, k and v are read once and the output is written once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import batched
from regard.native import chosen, function, no_memory, refusal
from regard.ops.linear.native.decode import Run, untraced
from regard.ops.linear.native.library import (
    NO_NORMALISER,
    Operand,
    divisor,
    operand,
    pointer,
)
from regard.ops.linear.problem import Problem, Solution, each_sequence
from regard.ops.linear.tiled import refuse_operands

OP = "linear_attention"
MAPS = {"identity": 0, "relu": 1, "elu": 2, "leaky_relu": 3, "exp": 4}  # of maps.h
CENTRED = -1  # in the place of a normaliser
# Products of channels times tokens from which a second thread is worth its start: a millisecond.
LEAST_WORK = 1 << 26

_INTEGERS = (
    "batch", "heads", "key_heads", "queries", "keys", "features", "channels", "query_map",
    "key_map", "normaliser", "centred", "threads",
)  # fmt: skip
_POINTERS = (
    "state", "total", "out", "sums", "of_keys", "of_values", "d_sums", "d_of_keys", "d_of_values",
    "dq", "dk", "dv", "d_state", "d_total",
)  # fmt: skip


class Whole(ctypes.Structure):
    """`Whole` of `call.h`, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        ("minimum", ctypes.c_double),
        *((name, Operand) for name in ("q", "k", "v", "d_out")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class Read(NamedTuple):
    """out [B, H, T, E]; S [B, Hk, D, E] and z [B, Hk, D] after all keys.

    Centred: S about the means, the mean key [B, Hk, D] and the mean value [B, Hk, E], which else
    has no element.
    """

    out: Tensor
    S: Tensor
    of_keys: Tensor
    of_values: Tensor


def whole(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None,
    query_map: str, key_map: str, scale: float, normaliser: int, minimum: float,
) -> Read:  # fmt: skip
    """What every query reads after all keys; float32, q [B, H, T, D], k [B, Hk, S, D], v.

    S, z: the state before the first key (not centred). O((T + S) D E) time; the inputs and the
    state are kept for the backward pass. Raises on double backward.
    """
    return Read(*_forward(q, k, v, S, z, query_map, key_map, scale, normaliser, minimum))


@cache
def _kernel(name: str, isa: str | None) -> Any:
    size = function(OP, "linear_whole_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != ctypes.sizeof(Whole):
        raise RuntimeError(f"{OP}: call.h and whole.py disagree about the size of a call")
    run = function(OP, f"linear_{name}", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.POINTER(Whole)]
    return run


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _call(
    q: Tensor, k: Tensor, v: Tensor, query_map: str, key_map: str, scale: float, normaliser: int,
    minimum: float,
) -> tuple[Whole, tuple[Tensor, ...]]:  # fmt: skip
    """What both passes are told, and the tensors that must live as long."""
    q, k, v = kept = _rows(q), _rows(k), _rows(v)
    (B, H, T, D), (_, Hk, S, E) = q.shape, v.shape
    centred = normaliser == CENTRED
    call = Whole(
        batch=B, heads=H, key_heads=Hk, queries=T, keys=S, features=D, channels=E,
        query_map=MAPS[query_map], key_map=MAPS[key_map],
        normaliser=NO_NORMALISER if centred else normaliser, centred=centred,
        threads=torch.get_num_threads() if _is_large(q, k, v) else 1,
        scale=scale, minimum=minimum, q=operand(q), k=operand(k), v=operand(v),
    )  # fmt: skip
    return call, kept


def _is_large(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (q.numel() + k.numel()) * v.shape[3] >= LEAST_WORK


def _run(name: str, call: Whole) -> None:
    if _kernel(name, chosen())(ctypes.byref(call)):
        raise no_memory(OP)


def _rooms(q: Tensor, v: Tensor, normaliser: int) -> tuple[tuple[int, ...], ...]:
    """The sizes of what is read."""
    (B, H, T, D), (_, Hk, _, E) = q.shape, v.shape
    of_keys = (B, Hk, D) if normaliser else (0,)
    return (B, H, T, E), (B, Hk, D, E), of_keys, (B, Hk, E) if normaliser == CENTRED else (0,)


def _results(q: Tensor, v: Tensor, normaliser: int) -> Read:
    return Read(*(q.new_empty(room) for room in _rooms(q, v, normaliser)))


def _read(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None,
    query_map: str, key_map: str, scale: float, normaliser: int, minimum: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = _results(q, v, normaliser)
    call, kept = _call(q, k, v, query_map, key_map, scale, normaliser, minimum)
    before = [None if x is None else x.contiguous() for x in (S, z)]
    call.state, call.total = (None if x is None else x.data_ptr() for x in before)
    call.out, call.sums = found.out.data_ptr(), found.S.data_ptr()
    if normaliser:
        call.of_keys = found.of_keys.data_ptr()
    if normaliser == CENTRED:
        call.of_values = found.of_values.data_ptr()
    _run("whole", call)
    del kept, before
    return tuple(found)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None,
    query_map: str, key_map: str, scale: float, normaliser: int, minimum: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_results(q, v, normaliser))


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, of_keys: Tensor, normaliser: int
) -> tuple[Tensor, ...]:
    state = (S.new_empty(0), S.new_empty(0)) if normaliser == CENTRED else (
        S.new_empty(S.shape), of_keys.new_empty(of_keys.shape)
    )  # fmt: skip
    return *(x.new_empty(x.shape) for x in (q, k, v)), *state


def _differentiate(
    d_out: Tensor, d_S: Tensor, d_of_keys: Tensor, d_of_values: Tensor,
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, of_keys: Tensor, of_values: Tensor,
    query_map: str, key_map: str, scale: float, normaliser: int, minimum: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = _gradients(q, k, v, S, of_keys, normaliser)
    call, kept = _call(q, k, v, query_map, key_map, scale, normaliser, minimum)
    rows = _rows(d_out)
    call.d_out = operand(rows)
    given = [x.contiguous() for x in (S, of_keys, of_values, d_S, d_of_keys, d_of_values)]
    names = ("sums", "of_keys", "of_values", "d_sums", "d_of_keys", "d_of_values")
    results = ("dq", "dk", "dv", "d_state", "d_total")
    for name, x in (*zip(names, given, strict=True), *zip(results, found, strict=True)):
        if x.numel():
            setattr(call, name, x.data_ptr())
    _run("whole_gradient", call)
    del kept, given, rows
    return found


def _fake_differentiate(
    d_out: Tensor, d_S: Tensor, d_of_keys: Tensor, d_of_values: Tensor,
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, of_keys: Tensor, of_values: Tensor,
    query_map: str, key_map: str, scale: float, normaliser: int, minimum: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _gradients(q, k, v, S, of_keys, normaliser)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, S, z, *ctx.options = inputs
    ctx.state = S is not None, z is not None
    ctx.save_for_backward(q, k, v, *output[1:])


def _backward_of_forward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    *found, d_S, d_z = _backward(*gradients, *ctx.saved_tensors, *ctx.options)
    has_S, has_z = ctx.state
    state = d_S if has_S else None, d_z if has_z else None
    return *found, *state, None, None, None, None, None


_OPTIONS = "str query_map, str key_map, float scale, int normaliser, float minimum"
_backward = define(
    "linear_whole_native_bwd",
    "(Tensor d_out, Tensor d_S, Tensor d_of_keys, Tensor d_of_values, Tensor q, Tensor k, "
    f"Tensor v, Tensor S, Tensor of_keys, Tensor of_values, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _differentiate,
    _fake_differentiate,
    vmap=batched(lambda *given: _backward(*given)),
)
_forward = define(
    "linear_whole_native_fwd",
    f"(Tensor q, Tensor k, Tensor v, Tensor? S, Tensor? z, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _read,
    _fake,
    backward=_backward_of_forward,
    setup_context=_save,
    vmap=batched(lambda *given: _forward(*given)),
)


def refuse_tensors(q: Tensor) -> str | None:
    """Why C does not take these queries, or None."""
    if q.device.type not in ("cpu", "meta"):
        return f"it runs on a CPU, not on {q.device.type}"
    if q.dtype != torch.float32:
        return f"it reads float32, not {str(q.dtype).removeprefix('torch.')}"
    return refusal()


def refuse(problem: Problem) -> str | None:
    """Why this form cannot serve a problem, or None."""
    return refuse_operands(problem, MAPS) or refuse_tensors(problem.q)


def _options(problem: Problem) -> tuple[str, str, float]:
    """Both maps and the scale."""
    scale = 1.0 if problem.scale is None else float(problem.scale)
    return problem.query_map.name, problem.key_map.name, scale


def _solve(problem: Problem) -> Solution:
    normaliser, minimum = divisor(problem)
    operands = problem.q, problem.k, problem.v, problem.S, problem.z
    found = whole(*operands, *_options(problem), normaliser, minimum)
    return Solution(found.out, found.S, found.of_keys if normaliser else None)


solve = each_sequence(_solve)


def plan(problem: Problem, isa: str | None) -> Run | None:
    """What runs every problem with the metadata and options of this one; None for copies."""
    if not untraced(problem, problem.S, problem.z):
        return None
    q, k, v = problem.q, problem.k, problem.v
    normaliser, minimum = divisor(problem)
    call, kept = _call(q, k, v, *_options(problem), normaliser, minimum)
    before = problem.S, problem.z
    if any(x is not None and not x.is_contiguous() for x in before) or any(
        x is not y for x, y in zip((q, k, v), kept, strict=True)
    ):
        return None
    ready, run_kernel = bytes(call), _kernel("whole", isa)
    large, rooms = _is_large(q, k, v), _rooms(q, v, normaliser)[:3]

    def run(problem: Problem, S: Tensor | None, z: Tensor | None) -> Solution:
        q, call = problem.q, Whole.from_buffer_copy(ready)
        out, sums, of_keys = (q.new_empty(room) for room in rooms)
        if large:
            call.threads = torch.get_num_threads()
        call.q.data, call.k.data = q.data_ptr(), problem.k.data_ptr()
        call.v.data, call.out = problem.v.data_ptr(), out.data_ptr()
        call.state, call.total, call.sums = pointer(S), pointer(z), sums.data_ptr()
        if normaliser:
            call.of_keys = of_keys.data_ptr()
        if run_kernel(ctypes.byref(call)):
            raise no_memory(OP)
        return Solution(out, sums, of_keys if normaliser else None)

    return run
