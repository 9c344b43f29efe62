"""A decoding step: where nothing is traced and nothing needs a gradient, C is called directly.

A step costs C as much as Python needs to check it. What its checks look at, metadata and options,
is the same from token to token: `signature` names all of it, and a call whose signature was
checked once goes straight to C.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.core.dispatch import is_asking
from regard.core.state import FixedState
from regard.native import chosen, function
from regard.ops.linear.native.library import BY_CLAMP, BY_SUM, NO_NORMALISER
from regard.ops.linear.native.walk import OP
from regard.ops.linear.problem import Problem, Solution

_STEP = struct.Struct("=9q 3d 15q 5q")  # `Step` of decode.h
_MAPS = {"identity": 0, "unit": 1, "elu": 2, "relu": 3}
_NUMBERS = {float, int, type(None)}
_PLAIN = {Tensor, torch.nn.Parameter}


_MOST_SIGNATURES = 1024

checked: set[tuple[Any, ...]] = set()  # signatures of calls that passed and that this form serves


def signature(
    op: str, problem: Problem, state: Any, return_state: bool, impl: str
) -> tuple[Any, ...] | None:
    """All that decides about an unchecked call of `op`, for the next one; None if it is no step."""
    q, k, v = problem.q, problem.k, problem.v
    if torch.compiler.is_compiling() or not {type(q), type(k), type(v)} <= _PLAIN:
        return None
    if not (q.dim() == k.dim() == 4 and q.shape[2] == 1) or type(state) is not FixedState:
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    known = problem.causal is True and (return_state is True or return_state is False)
    if not known or type(problem.scale) not in _NUMBERS or is_asking():
        return None
    S, z = state.tensors.get("S"), state.tensors.get("z")
    if not (_fits(problem) and untraced(problem, S, z)):
        return None
    operands = [
        None if x is None else (x.shape, x.dtype) for x in (problem.log_decay, problem.beta, S, z)
    ]
    return (
        chosen(), op, impl, return_state, state.mechanism, len(state.tensors), q.shape, k.shape,
        v.shape, k.dtype, v.dtype, problem.scale, problem.normaliser, problem.epsilon,
        problem.query_map.name, problem.key_map.name, *operands,
    )  # fmt: skip


def remember(signature: tuple[Any, ...]) -> None:
    """Lets the next call of that signature go straight to C."""
    if len(checked) >= _MOST_SIGNATURES:
        checked.clear()
    checked.add(signature)


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
        and type(problem.scale) in _NUMBERS
        and problem.query_map.name in _MAPS
        and problem.key_map.name in _MAPS
    )


def untraced(problem: Problem, S: Tensor | None, z: Tensor | None) -> bool:
    """Whether a call may leave torch: no gradient is needed and nobody looks on."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    grad = torch.is_grad_enabled()
    for x in (
        problem.q, problem.k, problem.v, problem.log_decay, problem.beta, S, z
    ):  # fmt: skip
        if x is None:
            continue
        if type(x) not in _PLAIN or not x.is_cpu or (grad and x.requires_grad):
            return False
    return True


def decode(problem: Problem) -> Solution:
    """The solution of a problem that `serves`; the state is always brought."""
    return step(problem, problem.S, problem.z, chosen())


def step(problem: Problem, S: Tensor | None, z: Tensor | None, isa: str | None) -> Solution:
    """The same with S and z in the place of the problem's, by one instruction set."""
    q, k, v = problem.q, problem.k, problem.v
    (B, H, _, F), (_, Hk, _, E) = q.shape, v.shape
    log_decay, beta = _float32(problem.log_decay), _float32(problem.beta)
    normaliser = NO_NORMALISER
    if problem.normaliser is not None:
        normaliser = BY_SUM if problem.minimum is None else BY_CLAMP
    out, following = q.new_empty(B, H, 1, E), q.new_empty(B, Hk, F, E)
    total = q.new_empty(B, Hk, F) if normaliser else None
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    S, z = (x if x is None or x.is_contiguous() else x.contiguous() for x in (S, z))
    packed = _STEP.pack(
        B, H, Hk, F, E, _MAPS[problem.query_map.name], _MAPS[problem.key_map.name],
        problem.per_channel, normaliser,
        1.0 if problem.scale is None or normaliser == BY_SUM else problem.scale,
        problem.minimum or 0.0, problem.epsilon,
        *_operand(q), *_operand(k), *_operand(v), *_operand(log_decay), *_operand(beta),
        _pointer(S), _pointer(z), out.data_ptr(), following.data_ptr(), _pointer(total),
    )  # fmt: skip
    if _kernel(isa)(packed):
        raise MemoryError(f"{OP}: no memory for a decoding step")
    return Solution(out, following, total)


def _float32(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.dim() < 4 or x.stride(3) == 1 else x.contiguous()


def _operand(x: Tensor | None) -> tuple[int, int, int]:
    """`StepOperand` of a tensor [B, 1 | H, 1, ...]."""
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def _kernel(isa: str | None) -> Callable[[bytes], int]:
    """The step of the best instruction set, or of one, for the bytes of a `Step`."""
    size = function(OP, "linear_step_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != _STEP.size:
        raise RuntimeError(f"{OP}: decode.h and decode.py disagree about the size of a step")
    run = function(OP, "linear_step", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    return run
