"""Variants of local linear attention: kernels, no intercept, block-diagonal, the authors' ways."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ops.samples import tensors
from regard.core.budgets import relative_error
from regard.ops.local_linear import (
    flash_lla,
    local_linear_attention,
    local_linear_slope,
    local_linear_weights,
)
from regard.ops.local_linear.reference import local_linear_attention_reference
from regard.ops.softmax import softmax_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "local_linear_attention"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    data = load_file(GOLDEN / f"{name}.safetensors")
    return data, json.loads((GOLDEN / f"{name}.json").read_text())["args"]


def compare(options: dict[str, Any], causal: bool, T: int, S: int, D: int = 6) -> None:
    """Value and all gradients against the reference, in float64, with every operand at once."""
    q, k, v = tensors(2, T=T, S=S, D=D)
    generator = torch.Generator().manual_seed(3)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = {
        "ridge": uniform(2, 2, T) + 0.5,
        "scale": uniform(4),
        "key_bias": uniform(2, 2, S),
        "log_decay": -0.1 * uniform(2, 4, S),
    }
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    options = {"causal": causal, "key_mask": uniform(2, S) < 0.8, **leaves, **options}
    inputs = [x.requires_grad_() for x in (q, k, v)] + list(leaves.values())
    known = {name: x for name, x in options.items() if name not in ("solver", "grad")}
    expected = local_linear_attention_reference(q, k, v, **known)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, weight)
    out = local_linear_attention(q, k, v, **options)
    assert relative_error(out, expected) < 1e-10
    found = torch.autograd.grad(out, inputs, weight)
    for name, a, b in zip("qkvrsbd", found, wanted, strict=True):
        assert relative_error(a, b) < 1e-8, name


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize(("causal", "T", "S"), [(False, 20, 30), (True, 150, 150), (True, 9, 20)])
@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("options", [{"kernel": "gaussian"}, {"intercept": False}], ids=str)
def test_equal_the_reference(
    options: dict[str, Any], solver: str, causal: bool, T: int, S: int, mode: str
):
    compare({**options, "solver": solver, "ridge_mode": mode}, causal, T, S)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize(("causal", "T", "S"), [(False, 20, 30), (True, 150, 150), (True, 9, 20)])
@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_blocks_equal_the_reference(width: int, causal: bool, T: int, S: int, mode: str):
    compare({"covariance_block": width, "ridge_mode": mode}, causal, T, S)


# -- the Gaussian kernel -------------------------------------------------------------------


def test_gaussian_kernel_is_a_function_of_differences():
    q, k, v = tensors(T=20, S=20, dtype=torch.float32)
    options = {"causal": True, "kernel": "gaussian", "scale": 0.7, "ridge": 0.1}
    for mode in ("relative", "absolute"):
        out = local_linear_attention(q, k, v, **options, ridge_mode=mode)
        moved = local_linear_attention(q + 64, k + 64, v, **options, ridge_mode=mode)
        assert relative_error(moved, out) < 1e-4  # the sums q + 64 are rounded, to 4e-6
        biased = local_linear_attention(
            q, k, v, causal=True, scale=0.7, ridge=0.1, key_bias=-0.35 * k.square().sum(-1)
        )
        if mode == "relative":
            assert relative_error(biased, out) < 1e-5


def test_gaussian_log_sum_exp_and_absolute_ridge():
    q, k, v = tensors(T=20, S=20)
    _, aux = local_linear_attention(q, k, v, kernel="gaussian", scale=0.7, return_aux=True)
    distance = (q[:, :, :, None] - k.repeat_interleave(2, 1)[:, :, None]).square().sum(-1)
    evidence = torch.exp(-0.35 * distance).sum(-1)
    assert relative_error(aux.lse, evidence.log()) < 1e-12
    absolute = local_linear_attention(
        q, k, v, kernel="gaussian", scale=0.7, ridge_mode="absolute", ridge=0.2
    )
    relative = local_linear_attention(q, k, v, kernel="gaussian", scale=0.7, ridge=0.2 / evidence)
    assert relative_error(absolute, relative) < 1e-10


def test_gaussian_kernel_decodes():
    q, k, v = tensors(T=12, S=12)
    options = {"causal": True, "kernel": "gaussian", "ridge_mode": "absolute", "ridge": 0.3}
    whole = local_linear_attention(q, k, v, **options)
    state, outs = None, []
    for i in range(12):
        at = slice(i, i + 1)
        out, state = local_linear_attention(
            q[:, :, at], k[:, :, at], v[:, :, at], state=state, return_state=True, **options
        )
        outs.append(out)
    assert relative_error(torch.cat(outs, 2), whole) < 1e-11


# -- no intercept --------------------------------------------------------------------------


def mesa(q: Tensor, k: Tensor, v: Tensor, ridge: float, log_decay: Tensor) -> Tensor:
    """(sum_j c_j v_j k_j^T)(sum_j c_j k_j k_j^T + ridge I)^-1 q with decayed sums, inclusive."""
    D = q.shape[3]
    G = torch.zeros(*k.shape[:2], v.shape[3], D, dtype=q.dtype)
    M = torch.zeros(*k.shape[:2], D, D, dtype=q.dtype)
    outs = []
    for t in range(q.shape[2]):
        keep = log_decay[:, :, t].exp()[..., None, None]
        G = G * keep + v[:, :, t, :, None] * k[:, :, t, None, :]
        M = M * keep + k[:, :, t, :, None] * k[:, :, t, None, :]
        solved = torch.linalg.solve(M + ridge * torch.eye(D, dtype=q.dtype), q[:, :, t])
        outs.append((G @ solved[..., None])[..., 0])
    return torch.stack(outs, 2)


def test_without_intercept_it_contains_mesanet():
    q, k, v = tensors(H=2, Hk=2, T=30, S=30)
    decay = -0.3 * torch.rand(2, 2, 30, dtype=torch.float64)
    for solver in ("direct", "cg"):
        out = local_linear_attention(
            q, k, v, causal=True, intercept=False, scale=0.0, ridge=0.4, ridge_mode="absolute",
            log_decay=decay, solver=solver,
        )
        # The evidence of query i is weighted by exp(sum of the decays after j): the same sums.
        assert relative_error(out, mesa(q, k, v, 0.4, decay)) < 1e-8


def test_linear_values_are_reproduced_without_intercept():
    q, k, _ = tensors(T=40, S=40)
    M = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = local_linear_attention(q, k, k @ M, causal=True, intercept=False, ridge=1e-9)
    assert (out - q @ M)[:, :, 12:].abs().max() < 1e-5


# -- the authors' ways ---------------------------------------------------------------------


def test_authors_block_diagonal_operator():
    data, args = golden("official_blockdiag")
    options = {
        "causal": True, "scale": args["qk_scale"], "ridge": args["ridge_lambda"],
        "covariance_block": args["lla_block_size"],
    }
    for dtype in (torch.float64, torch.float32):
        leaves = [data[f"in.{n}"][:, None].to(dtype).requires_grad_() for n in "qkv"]
        out = local_linear_attention(*leaves, **options)
        assert torch.allclose(out[:, 0].float(), data["out.o"], rtol=1e-3, atol=1e-4)
        assert relative_error(out[:, 0], data["out.o"]) < 1e-4
        found = torch.autograd.grad(out, leaves, data["in.grad_o"][:, None].to(dtype))
        for leaf, grad in zip("qkv", found, strict=True):
            assert relative_error(grad[:, 0], data[f"grad.{leaf}"]) < 1e-3, leaf


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("name", ["official_causal_d16", "official_causal_lam10"])
def test_authors_gradient(name: str, solver: str):
    data, args = golden(name)
    leaves = [data[f"in.{n}"][:, None].requires_grad_() for n in "qkv"]
    weight = data["in.grad_o"][:, None]
    options = {
        "causal": True, "scale": args["qk_scale"], "ridge": float(data["in.ridge_lambda"]),
        "solver": solver,
    }
    exact = torch.autograd.grad(local_linear_attention(*leaves, **options), leaves, weight)
    out = local_linear_attention(*leaves, **options, grad="official")
    found = torch.autograd.grad(out, leaves, weight)
    for leaf, grad in zip("qkv", found, strict=True):
        assert relative_error(grad[:, 0], data[f"out.official_backward.grad_{leaf}"]) < 1e-3, leaf
    assert relative_error(found[0], exact[0]) > 0.03
    assert torch.equal(found[2], exact[2])


@pytest.mark.parametrize("name", ["official_causal_d16", "official_causal_lam10"])
def test_flash_lla(name: str):
    data, args = golden(name)
    q, k, v = (data[f"in.{n}"].requires_grad_() for n in "qkv")
    o, omega = flash_lla(q, k, v, data["in.ridge_lambda"], args["qk_scale"])
    assert relative_error(o, data["out.o"]) < 1e-4
    scores = (args["qk_scale"] * q @ k.mT).double()
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.exp(scores - scores.amax(-1, keepdim=True)).sum(-1)
    assert relative_error(omega, expected) < 1e-5
    found = torch.autograd.grad(o, (q, k, v), data["in.grad_o"])
    for leaf, grad in zip("qkv", found, strict=True):
        assert relative_error(grad, data[f"grad.{leaf}"]) < 2e-3, leaf


def test_flash_lla_ridges_and_refusals():
    q, k, v = torch.randn(3, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    whole, _ = flash_lla(q, k, v, 0.3)
    for shape in ((), (1,), (7,), (2, 7)):
        out, _ = flash_lla(q, k, v, torch.full(shape, 0.3))
        assert relative_error(out, whole) < 1e-6
    per_token = torch.rand(2, 7) + 0.1
    out, _ = flash_lla(q, k, v, per_token)
    expected = local_linear_attention(
        q[:, None], k[:, None], v[:, None], causal=True, ridge=per_token[:, None], tol=1e-6
    )
    assert relative_error(out, expected[:, 0]) < 1e-5
    for wrong, message in (
        ({"ridge_lambda": 0.0}, "ridge_lambda must be a finite number above 0"),
        ({"qk_scale": math.inf}, "qk_scale must be a finite number"),
        ({"ridge_lambda": torch.ones(3)}, r"of shape \[\], \[1\], \[7\] or \[2, 7\]"),
        ({"cg_use_preconditioner": True}, "cg_use_preconditioner must be False"),
        ({"cg_rtol": -1.0}, "cg_rtol must be"),
        ({"cg_max_iters": 0}, "cg_max_iters must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"flash_lla: .*{message}"):
            flash_lla(q, k, v, **wrong)
    with pytest.raises(ValueError, match="3-dimensional"):
        flash_lla(q[None], k[None], v[None])


# -- looking inside ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "gaussian", "ridge_mode": "absolute"},
        {"intercept": False},
        {"covariance_block": 3},
        {"solver": "cg", "max_iters": 2},
    ],
    ids=str,
)
def test_weights_of_variants(options: dict[str, Any]):
    q, k, v = tensors(T=20, S=20, D=6)
    options = {"causal": True, "ridge": 0.2, **options}
    weights = local_linear_weights(q, k, **options)
    out = local_linear_attention(q, k, v, **options)
    assert relative_error(weights @ v.repeat_interleave(2, 1), out) < 1e-11
    if options.get("intercept", True):
        assert (weights.sum(-1) - 1).abs().max() < 1e-10


def test_slope_of_variants():
    q, k, v = tensors(T=20, S=20)
    slope = local_linear_slope(q, k, v, causal=True, intercept=False, ridge=0.2)
    out = local_linear_attention(q, k, v, causal=True, intercept=False, ridge=0.2)
    assert relative_error((slope @ q[..., None])[..., 0], out) < 1e-10
    options = {"causal": True, "ridge": 0.2, "ridge_mode": "absolute", "scale": 0.5}
    slope = local_linear_slope(q.float(), k.float(), v.float(), kernel="gaussian", **options)
    bias = -0.25 * k.square().sum(-1)
    vbar = softmax_attention(q, k, v, causal=True, scale=0.5, key_bias=bias)
    kbar = softmax_attention(q, k, k, causal=True, scale=0.5, key_bias=bias)
    out = local_linear_attention(q, k, v, kernel="gaussian", **options)
    predicted = vbar + (slope.double() @ (q - kbar)[..., None])[..., 0]
    assert relative_error(predicted, out) < 1e-5


def test_a_singular_row_has_slope_0_and_leaves_the_others_alone():
    """Equal keys, and an absolute ridge that vanishes beside exp(score): no slope to be found."""
    q, k, v = tensors(T=12, S=12)
    options = {"causal": True, "ridge": 0.2, "ridge_mode": "absolute"}
    window = {"window": (1, 0)}  # two keys span no more than a line
    wanted = local_linear_slope(q, k, v, **options, **window)
    q[:, :, 7] *= 1e3
    slope = local_linear_slope(q, k, v, **options, **window)
    out, aux = local_linear_attention(q, k, v, **options, **window, return_aux=True)
    weights = local_linear_weights(q, k, **options, **window)
    lost = aux.residual == 1
    assert lost[:, :, 7].any()
    assert not lost[:, :, :7].any()
    assert not lost[:, :, 8:].any()
    assert (slope[lost] == 0).all()
    assert torch.equal(slope[:, :, :7], wanted[:, :, :7])
    assert torch.equal(slope[:, :, 8:], wanted[:, :, 8:])
    average = softmax_attention(q, k, v, causal=True, **window)
    assert relative_error(out[lost], average[lost]) < 1e-12
    assert relative_error(weights @ v.repeat_interleave(2, 1), out) < 1e-12


@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ridge_mode": "absolute"},
        {"kernel": "gaussian"},
        {"intercept": False},
        {"covariance_block": 3},
    ],
)
def test_no_size_of_a_later_key_reaches_the_reference(
    options: dict[str, Any], dtype: torch.dtype, size: float
):
    """Its square overflows, and the systems of the rows that see it are singular."""
    call = partial(local_linear_attention, causal=True, impl="reference", **options)
    results = []
    for junk in (0.25, size):
        q, k, v = (x.to(dtype) for x in tensors(T=7, S=7, D=6))
        k[:, :, 4:] = junk
        given = [x.requires_grad_() for x in (q, k, v)]
        scale = torch.full((q.shape[1],), 0.4, dtype=torch.float64, requires_grad=True)
        out = call(*given, scale=scale)[:, :, :4]
        grads = torch.autograd.grad(out.float().square().sum(), [*given, scale])
        results.append([out, *grads])
    for x, y in zip(*results, strict=True):
        assert y.isfinite().all()
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gauss"}, "kernel must be one of 'dot', 'gaussian'"),
        ({"intercept": 1}, "intercept must be True or False"),
        ({"grad": "true"}, "grad must be one of 'exact', 'official'"),
        ({"covariance_block": 4}, "covariance_block must be a divisor of the head size 6, got 4"),
        ({"covariance_block": 0}, "covariance_block must be an int of at least 1"),
        ({"covariance_block": 2, "solver": "cg"}, "solver must be 'auto' or 'direct' with cov"),
        ({"covariance_block": 2, "intercept": False}, "intercept must be True with cov"),
        ({"covariance_block": 2, "grad": "official"}, "grad must be 'exact' with cov"),
        ({"grad": "official", "impl": "reference"}, "its gradient is exact"),
    ],
)
def test_refusals(options: dict[str, Any], message: str):
    q, k, v = tensors(D=6)
    with pytest.raises((ValueError, TypeError), match=f"local_linear_attention: .*{message}"):
        local_linear_attention(q, k, v, **options)
