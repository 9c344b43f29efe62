"""Hedgehog's feature maps in plain C: z is a product of torch's, what follows is one pass a row."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.native import chosen, function
from regard.ops.linear import learned_features
from regard.ops.linear.problem import Feature, Problem

KINDS = {"softmax_dim": 0, "exp_dim": 1, "exp": 2, "joint_softmax": 3, "pos_elu": 4}
LEAST_PER_THREAD = 1 << 15  # features for which a thread is worth starting


def with_native_maps(problem: Problem) -> Problem:
    """The same problem; maps that this file knows, of float32 and 16-bit inputs, run in C."""
    if problem.q.dtype == torch.float64:
        return problem
    return problem._replace(query_map=_native(problem.query_map), key_map=_native(problem.key_map))


def _native(feature: Feature) -> Feature:
    prefix, _, activation = feature.name.partition(":")
    half, shifted = activation.endswith(":half"), "_shifted" in activation
    kind = activation.removesuffix(":half").removesuffix("_shifted")
    if prefix != "hedgehog" or kind not in KINDS or feature.project is None:
        return feature
    project, options = feature.project, (kind, not half, shifted)
    return feature._replace(apply=lambda x: _forward(project(x), *options))


@cache
def _kernel(name: str, pointers: int, isa: str | None) -> Any:
    run = function("linear_activation", name, isa)
    run.restype = None
    run.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * 6
    return run


def _call(name: str, tensors: tuple[Tensor, ...], channels: int, options: Any) -> None:
    activation, full_space, shifted = options
    rows = tensors[0].numel() // max(1, tensors[0].shape[-1])
    threads = min(torch.get_num_threads(), 1 + rows * channels // LEAST_PER_THREAD)
    if rows:
        _kernel(name, len(tensors), chosen())(
            *(x.data_ptr() for x in tensors), rows, channels, KINDS[activation],
            int(full_space), int(shifted), threads,
        )  # fmt: skip


def _activate(z: Tensor, activation: str, full_space: bool, shifted: bool) -> Tensor:
    z, F = z.contiguous(), z.shape[-1]
    phi = z.new_empty(*z.shape[:-1], learned_features.width(activation, F, full_space))
    _call("linear_activate", (z, phi), F, (activation, full_space, shifted))
    return phi


def _differentiate(
    gradient: Tensor, phi: Tensor, activation: str, full_space: bool, shifted: bool
) -> Tensor:
    F = phi.shape[-1] // learned_features.width(activation, 1, full_space)
    dz = phi.new_empty(*phi.shape[:-1], F)
    options = activation, full_space, shifted
    _call("linear_activate_backward", (gradient.contiguous(), phi.contiguous(), dz), F, options)
    return dz


def _of_forward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return _backward(gradient, *ctx.saved_tensors, *ctx.options), None, None, None


_backward = define(
    "linear_activation_native_bwd",
    f"(Tensor gradient, Tensor phi, {learned_features.OPTIONS}) -> Tensor",
    _differentiate,
    learned_features.fake_gradient,
    vmap=learned_features.mapped(lambda *given: _backward(*given), 2),
)
_forward = define(
    "linear_activation_native_fwd",
    f"(Tensor z, {learned_features.OPTIONS}) -> Tensor",
    _activate,
    learned_features.fake,
    backward=_of_forward,
    setup_context=learned_features.save_result,
    vmap=learned_features.mapped(lambda *given: _forward(*given), 1),
)
