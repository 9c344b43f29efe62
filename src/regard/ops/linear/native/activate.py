"""Hedgehog's feature maps in plain C, `regard::linear_features_native_fwd`: a product and a row
at a time, so that z = x W + b is never written. Its backward goes back through torch's products.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.native import chosen, function, no_memory
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
    given = feature.apply.keywords  # of `learned_features.features`
    weight, bias, skip = (given[name] for name in ("weight", "bias", "skip"))
    options = kind, not half, shifted
    if weight is None:  # z = x + b, if that
        project = feature.project
        return feature._replace(apply=lambda x: _forward(project(x), *options))
    return feature._replace(apply=lambda x: _features(x, weight, bias, skip, *options))


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


def _project_activate(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: bool, activation: str, full_space: bool,
    shifted: bool,
) -> Tensor:  # fmt: skip
    (B, H, T, D), C = x.shape, weight.shape[2]
    x = x if x.stride(3) == 1 or D == 1 else x.contiguous()
    W = weight.to(x.dtype).contiguous()
    b = None
    if bias is not None:
        b = bias.to(x.dtype).reshape(bias.shape[0], -1).expand(-1, C).contiguous()
    phi = x.new_empty(B, H, T, learned_features.width(activation, C, full_space))
    threads = min(torch.get_num_threads(), 1 + B * H * T * C // LEAST_PER_THREAD)
    sizes = (
        B, H, T, D, C, *x.stride()[:3], W.shape[0], 0 if b is None else b.shape[0], skip,
        KINDS[activation], full_space, shifted, threads,
    )  # fmt: skip
    if phi.numel() and _project_kernel(chosen())(
        x.data_ptr(), W.data_ptr(), None if b is None else b.data_ptr(), phi.data_ptr(),
        (ctypes.c_int64 * len(sizes))(*sizes),
    ):  # fmt: skip
        raise no_memory("linear_activation")
    return phi


@cache
def _project_kernel(isa: str | None) -> Any:
    run = function("linear_activation", "linear_project_activate", isa)
    run.restype = ctypes.c_int64
    run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.POINTER(ctypes.c_int64)]
    return run


def _fake_features(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: bool, activation: str, full_space: bool,
    shifted: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(
        *x.shape[:3], learned_features.width(activation, weight.shape[2], full_space)
    )


def _save_features(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.skip, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, output)


def _of_features(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, weight, bias, phi = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dz, dx, d_weight, d_bias = _backward(gradient, phi, *ctx.options), None, None, None
    if wants_x:
        dx = dz @ weight.to(dz.dtype).mT
        if ctx.skip:
            dx = dx + dz
    if wants_weight:
        d_weight = (x.mT @ dz).sum_to_size(1, *weight.shape)[0].to(weight.dtype)
    if wants_bias:
        summed = dz.sum(2)  # of tokens: [B, h, F]
        summed = summed if bias.dim() == 2 else summed.sum(2)
        d_bias = summed.sum_to_size(1, *bias.shape)[0].to(bias.dtype)
    return dx, d_weight, d_bias, None, None, None, None


def _map_features(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
    """Maps that are mapped over: z by torch's product, which knows how."""
    *tensors, skip, activation, full_space, shifted = given

    def composed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = learned_features.project(x, weight, bias, skip)
        return _forward(z, activation, full_space, shifted)

    return torch.vmap(composed, in_dims=in_dims[:3])(*tensors), 0


_features = define(
    "linear_features_native_fwd",
    f"(Tensor x, Tensor weight, Tensor? bias, bool skip, {learned_features.OPTIONS}) -> Tensor",
    _project_activate,
    _fake_features,
    backward=_of_features,
    setup_context=_save_features,
    vmap=_map_features,
)
