"""Unit rows as a pair of torch operators, `regard::linear_unit_native_fwd` and `_bwd`.

In torch they take seven passes over the keys and keep three of their size for the backward; here
one, and nothing but the keys themselves.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.mapped import rowwise
from regard.native import chosen, function
from regard.ops.linear.native.walk import OP
from regard.ops.linear.problem import Problem

_ROWS = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
_ARGUMENTS = {
    "unit": (ctypes.c_void_p, *_ROWS),
    "unit_gradient": (ctypes.c_void_p, ctypes.c_void_p, *_ROWS),
}


def with_native_unit(problem: Problem) -> Problem:
    """The same problem whose unit maps are C's, for float32 and what is computed in it."""
    query_map, key_map = (
        map._replace(apply=unit) if map.name == "unit" else map
        for map in (problem.query_map, problem.key_map)
    )
    return problem._replace(query_map=query_map, key_map=key_map)


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, of any size that the dtype holds; 0 stays 0."""
    return _forward(x)


def _unit(x: Tensor) -> Tensor:
    x, width = x.detach().contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        rows = x.numel() // width
        _kernel("unit", chosen())(x.data_ptr(), rows, width, y.data_ptr())
    return y


def _unit_gradient(dy: Tensor, x: Tensor) -> Tensor:
    x, dy, width = x.detach().contiguous(), dy.detach().contiguous(), x.shape[-1]
    dx = torch.empty_like(x)
    if x.numel():
        rows = x.numel() // width
        kernel = _kernel("unit_gradient", chosen())
        kernel(x.data_ptr(), dy.data_ptr(), rows, width, dx.data_ptr())
    return dx


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> Tensor:
    return _backward(gradient, *ctx.saved_tensors)


@cache
def _kernel(name: str, isa: str | None) -> Any:
    run = function(OP, f"linear_{name}", isa)
    run.restype, run.argtypes = None, _ARGUMENTS[name]
    return run


_backward = define(
    "linear_unit_native_bwd",
    "(Tensor dy, Tensor x) -> Tensor",
    _unit_gradient,
    lambda dy, x: x.new_empty(x.shape),
    vmap=rowwise(lambda dy, x: _backward(dy, x)),
)
_forward = define(
    "linear_unit_native_fwd",
    "(Tensor x) -> Tensor",
    _unit,
    _fake,
    backward=_differentiate,
    setup_context=_save,
    vmap=rowwise(lambda x: _forward(x)),
)
