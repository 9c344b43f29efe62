"""A decoding step: where nothing is traced and nothing needs a gradient, C is called directly.

A step costs C as much as Python needs to check it: `again.py` has a call that is like one before
it go straight to `plan`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from regard.core.watched import PLAIN, is_watched
from regard.native import chosen, function, no_memory
from regard.ops.linear.native.library import BY_SUM, divisor
from regard.ops.linear.native.walk import OP
from regard.ops.linear.problem import NUMBERS, Problem, Solution

# `Step` of decode.h: what changes from token to token, then what does not.
_POINTERS = struct.Struct("=10Q")
_REST = struct.Struct("=9q 3d 10q")
_MAPS = {"identity": 0, "unit": 1, "elu": 2, "relu": 3}

Run = Callable[[Problem, Tensor | None, Tensor | None], Solution]  # a problem, its S and z


def serves(problem: Problem) -> bool:
    """Whether a problem is one float32 token after a past, with maps that C knows."""
    return _fits(problem) and untraced(problem, problem.S, problem.z)


def _fits(problem: Problem) -> bool:
    q, k = problem.q, problem.k
    return (
        q.shape[2] == 1 == k.shape[2]
        and problem.causal
        and q.dtype == torch.float32
        and problem.cu_seqlens is None
        and problem.cu_seqlens_k is None
        and problem.key_mask is None
        and problem.chunk is None
        and type(problem.scale) in NUMBERS
        and problem.query_map.name in _MAPS
        and problem.key_map.name in _MAPS
    )


def untraced(problem: Problem, S: Tensor | None, z: Tensor | None) -> bool:
    """Whether a call may leave torch: no gradient is needed and nobody looks on."""
    if is_watched():
        return False
    grad = torch.is_grad_enabled()
    for x in (
        problem.q, problem.k, problem.v, problem.log_decay, problem.beta, S, z
    ):  # fmt: skip
        if x is None:
            continue
        if type(x) not in PLAIN or not x.is_cpu or (grad and x.requires_grad):
            return False
    return True


def decode(problem: Problem) -> Solution:
    """The solution of a problem that `serves`; the state is always brought."""
    return _prepared(chosen(), problem, problem.S, problem.z)


def plan(problem: Problem, isa: str | None) -> Run:
    """What runs every step that has the metadata and options of this one, which `serves`."""
    q, k, v, log_decay, beta = given = _operands(problem)
    before = problem.S, problem.z
    if any(x is not None and not x.is_contiguous() for x in before) or any(
        x is not y for x, y in zip(given, _ready(*given), strict=True)
    ):
        return partial(_prepared, isa)  # copies are made of some
    rest, kernel = _rest(problem, q, k, v, log_decay, beta), _kernel(isa)
    of_out, of_state, of_total = _rooms(problem)
    pack = _POINTERS.pack

    def run(problem: Problem, S: Tensor | None, z: Tensor | None) -> Solution:
        q, log_decay, beta = problem.q, problem.log_decay, problem.beta
        out, following = q.new_empty(of_out), q.new_empty(of_state)
        total = None if of_total is None else q.new_empty(of_total)
        pointers = pack(
            q.data_ptr(), problem.k.data_ptr(), problem.v.data_ptr(),
            0 if log_decay is None else log_decay.data_ptr(),
            0 if beta is None else beta.data_ptr(), 0 if S is None else S.data_ptr(),
            0 if z is None else z.data_ptr(), out.data_ptr(), following.data_ptr(),
            0 if total is None else total.data_ptr(),
        )  # fmt: skip
        if kernel(pointers + rest):
            raise no_memory(OP)
        return Solution(out, following, total)

    return run


def _prepared(isa: str | None, problem: Problem, S: Tensor | None, z: Tensor | None) -> Solution:
    """A step of operands that may need a copy first."""
    given = _ready(*_operands(problem))
    S, z = (x if x is None or x.is_contiguous() else x.contiguous() for x in (S, z))
    results = [None if room is None else problem.q.new_empty(room) for room in _rooms(problem)]
    pointers = [0 if x is None else x.data_ptr() for x in (*given, S, z, *results)]
    if _kernel(isa)(_POINTERS.pack(*pointers) + _rest(problem, *given)):
        raise no_memory(OP)
    out, following, total = results
    assert out is not None
    return Solution(out, following, total)


def _operands(problem: Problem) -> tuple[Any, ...]:
    return problem.q, problem.k, problem.v, problem.log_decay, problem.beta


def _ready(*operands: Tensor | None) -> list[Any]:
    """float32, the last of four axes contiguous."""
    found: list[Any] = []
    for x in operands:
        if x is not None and x.dtype != torch.float32:
            x = x.float()
        found.append(x if x is None or x.dim() < 4 or x.stride(3) == 1 else x.contiguous())
    return found


def _rooms(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """The sizes of the output, of the next S and of the next z."""
    (B, H, _, F), (_, Hk, _, E) = problem.q.shape, problem.v.shape
    return (B, H, 1, E), (B, Hk, F, E), None if problem.normaliser is None else (B, Hk, F)


def _rest(problem: Problem, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> bytes:
    """All of a `Step` but its pointers."""
    (B, H, _, F), (_, Hk, _, E) = q.shape, v.shape
    normaliser, minimum = divisor(problem)
    strides = [n for x in (q, k, v, *others) for n in _strides(x)]
    return _REST.pack(
        B, H, Hk, F, E, _MAPS[problem.query_map.name], _MAPS[problem.key_map.name],
        problem.per_channel, normaliser,
        1.0 if problem.scale is None or normaliser == BY_SUM else problem.scale,
        minimum, problem.epsilon, *strides,
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, int]:
    """`StepStrides` of a tensor [B, 1 | H, 1, ...]."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1) if x.shape[1] > 1 else 0)


@cache
def _kernel(isa: str | None) -> Callable[[bytes], int]:
    """The step of the best instruction set, or of one, for the bytes of a `Step`."""
    size = function(OP, "linear_step_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != _POINTERS.size + _REST.size:
        raise RuntimeError(f"{OP}: decode.h and decode.py disagree about the size of a step")
    run = function(OP, "linear_step", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    return run
