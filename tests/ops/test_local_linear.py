"""Local linear attention against its definition, the authors' code and its own limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ops.samples import of_kind, tensors
from regard.core.budgets import relative_error
from regard.ops.local_linear import (
    local_linear_attention,
    local_linear_slope,
    local_linear_weights,
)
from regard.ops.local_linear.reference import local_linear_attention_reference
from regard.ops.softmax import softmax_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "local_linear_attention"
EQUATIONS = ("equations_absolute_ridge", "equations_noncausal", "equations_cross_causal")
OFFICIAL = ("official_causal_d16", "official_causal_lam10")
SOLVERS = ("direct", "cg")
PATTERNS = [  # causal, queries, keys
    pytest.param(False, 9, 9, id="noncausal_self"),
    pytest.param(True, 9, 9, id="causal_self"),
    pytest.param(False, 6, 13, id="noncausal_cross"),
    pytest.param(True, 6, 13, id="causal_continued"),
    pytest.param(True, 11, 7, id="more_queries_than_keys"),
]


# -- fixtures ------------------------------------------------------------------------------


def golden(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors with a head axis, and the arguments of the op."""
    data = load_file(GOLDEN / f"{name}.safetensors")
    note = json.loads((GOLDEN / f"{name}.json").read_text())
    args = note["args"]
    ridge = data["in.ridge_lambda"].to(dtype)
    options = {
        "causal": note.get("causal", args.get("causal")),
        "scale": args.get("scale", args.get("qk_scale")),
        "ridge_mode": args.get("ridge", "relative"),
        "ridge": ridge[:, None] if ridge.dim() == 2 else float(ridge[0]),
    }
    return {k: t[:, None] if t.dim() == 3 else t for k, t in data.items()}, options


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_fixture(name: str, dtype: torch.dtype, solver: str):
    data, options = golden(name, dtype)
    options["solver"] = solver
    q, k, v = (data[f"in.{n}"].to(dtype).requires_grad_() for n in "qkv")
    options["ridge"].requires_grad_()
    scale = torch.full((1,), options.pop("scale"), dtype=dtype, requires_grad=True)
    out, aux = local_linear_attention(q, k, v, scale=scale, **options, return_aux=True)
    value, gradient = (1e-8, 1e-8) if dtype == torch.float64 else (2e-4, 2e-3)
    assert relative_error(out, data["out.o"]) < value
    assert relative_error(aux.slope, data["out.g"]) < 10 * value
    assert relative_error(aux.lse[:, 0], data["out.lse"]) < value
    leaves = {"q": q, "k": k, "v": v, "scale": scale, "ridge_lambda": options["ridge"]}
    found = torch.autograd.grad(out, list(leaves.values()), data["in.grad_o"].to(dtype))
    for (leaf, _), grad in zip(leaves.items(), found, strict=True):
        expected = data[f"grad.{leaf}"].reshape(grad.shape)
        assert relative_error(grad, expected) < gradient, leaf


@pytest.mark.parametrize("name", OFFICIAL)
def test_authors_operator(name: str):
    data, options = golden(name, torch.float64)
    q, k, v = (data[f"in.{n}"].double().requires_grad_() for n in "qkv")
    out = local_linear_attention(q, k, v, **options)
    assert relative_error(out, data["out.o_float64_equations"]) < 1e-9
    found = torch.autograd.grad(out, (q, k, v), data["in.grad_o"].double())
    for leaf, grad in zip("qkv", found, strict=True):  # theirs were computed in float32
        assert relative_error(grad, data[f"grad.{leaf}"]) < 1e-3, leaf
    single = [data[f"in.{n}"].requires_grad_() for n in "qkv"]
    out = local_linear_attention(*single, **options)
    assert relative_error(out, data["out.o"]) < 2e-4
    assert torch.allclose(out, data["out.o"], rtol=1e-3, atol=1e-4)
    found = torch.autograd.grad(out, single, data["in.grad_o"])
    for leaf, grad in zip("qkv", found, strict=True):
        assert relative_error(grad, data[f"grad.{leaf}"]) < 1e-3, leaf


@pytest.mark.parametrize("name", OFFICIAL)
def test_slope_and_log_sum_exp_give_what_the_authors_save(name: str):
    """Their rho solves the system around the query, where ours is around the mean key."""
    data, options = golden(name, torch.float64)
    q, k, v = (data[f"in.{n}"].double() for n in "qkv")
    _, aux = local_linear_attention(q, k, v, **options, return_aux=True)
    shift = softmax_attention(q, k, k, causal=True, scale=options["scale"]) - q
    one_more = 1 + (shift * aux.slope).sum(-1, keepdim=True)
    assert relative_error(aux.slope / one_more, data["out.rho"]) < 1e-4
    omega = torch.exp(aux.lse[..., None] - data["out.m"])
    assert relative_error(omega / one_more, data["out.denom"]) < 1e-4


# -- the definition ------------------------------------------------------------------------


def least_squares(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, ridge: float, mode: str
) -> Tensor:
    """min over b, W of sum_j w_j |v_j - b - W (k_j - q)|^2 + ridge |W|^2, query by query.

    w are softmax weights ("relative") or exp(score) ("absolute"); rows of sqrt(ridge) W are
    appended to the design matrix, so that nothing of the closed form is used.
    """
    B, H, T, D = q.shape
    S, Dv = k.shape[2], v.shape[3]
    out = q.new_zeros(B, H, T, Dv)
    for b in range(B):
        for h in range(H):
            head = h // (H // k.shape[1])
            for i in range(T):
                count = i + S - T + 1 if causal else S
                if count <= 0:
                    continue
                keys, values = k[b, head, :count], v[b, head, :count]
                scores = keys @ q[b, h, i] * D**-0.5
                w = scores.softmax(0) if mode == "relative" else scores.exp()
                design = torch.cat([torch.ones(count, 1), keys - q[b, h, i]], 1)
                penalty = ridge**0.5 * torch.eye(D + 1)[1:]
                rows = torch.cat([design * w.sqrt()[:, None], penalty])
                target = torch.cat([values * w.sqrt()[:, None], torch.zeros(D, Dv)])
                out[b, h, i] = torch.linalg.lstsq(rows, target).solution[0]
    return out


@pytest.fixture
def double_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize(("causal", "T", "S"), PATTERNS)
@pytest.mark.usefixtures("double_default")
def test_weighted_least_squares(causal: bool, T: int, S: int, mode: str):
    q, k, v = tensors(T=T, S=S)
    expected = least_squares(q, k, v, causal, 0.3, mode)
    options = {"causal": causal, "ridge": 0.3, "ridge_mode": mode}
    for form in ({"solver": "direct"}, {"solver": "cg"}, {"impl": "reference"}):
        out = local_linear_attention(q, k, v, **options, **form)
        assert (out - expected).abs().max() < 1e-9
    single = [x.float() for x in (q, k, v)]
    for solver in SOLVERS:
        out = local_linear_attention(*single, **options, solver=solver)
        assert relative_error(out, expected) < (1e-5 if solver == "direct" else 2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool, mode: str, solver: str):
    q, k, v = (x.requires_grad_() for x in tensors(B=1, H=2, Hk=1, T=4, S=5, D=3, Dv=2))
    generator = torch.Generator().manual_seed(1)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    ridge = uniform(1, 1, 4).add(0.2).requires_grad_()
    scale = uniform(2).add(0.2).requires_grad_()
    bias, decay = uniform(1, 2, 5).requires_grad_(), (-uniform(1, 1, 5)).requires_grad_()
    decay.data[..., 1] = -torch.inf
    mask = torch.tensor([[True, True, False, True, True]])

    def run(q, k, v, ridge, scale, bias, steps):
        steps = torch.where(decay == -torch.inf, decay, steps)
        return local_linear_attention(
            q, k, v, causal=causal, ridge=ridge, ridge_mode=mode, scale=scale, key_mask=mask,
            key_bias=bias, log_decay=steps, solver=solver, tol=1e-12, max_iters=60,
        )

    steps = decay.detach().clamp(min=-1).requires_grad_()
    torch.autograd.gradcheck(run, (q, k, v, ridge, scale, bias, steps), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(150, 150), (300, 270), (40, 290)])
def test_blocks_equal_reference(lengths: tuple[int, int], causal: bool, mode: str):
    """Several blocks of queries, a small block size, and every operand at once."""
    T, S = lengths
    q, k, v = (x.requires_grad_() for x in tensors(2, B=2, T=T, S=S, D=6))
    generator = torch.Generator().manual_seed(3)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = {
        "ridge": uniform(2, 2, T) + 0.2,
        "scale": uniform(4),
        "key_bias": uniform(2, 1, S),
        "log_decay": -0.1 * uniform(2, 4, S),
    }
    leaves["log_decay"][:, 1, S // 2] = -torch.inf
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    options = {
        "causal": causal, "ridge_mode": mode, "window": (200, 70),
        "key_mask": uniform(2, S) < 0.8, **leaves,
    }
    expected = local_linear_attention_reference(q, k, v, **options)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    inputs = [q, k, v, *leaves.values()]
    wanted = torch.autograd.grad(expected, inputs, weight)
    for block_size, solver in ((None, "cg"), (None, "direct"), (33, "cg"), (33, "direct")):
        out = local_linear_attention(
            q, k, v, **options, block_size=block_size, solver=solver
        )
        assert relative_error(out, expected) < 1e-10
        found = torch.autograd.grad(out, inputs, weight)
        for name, a, b in zip("qkvrsbd", found, wanted, strict=True):
            assert relative_error(a, b) < 1e-8, name


# -- limits and invariances ----------------------------------------------------------------


def test_large_ridge_is_softmax_attention():
    q, k, v = tensors(T=33, S=33, D=16, dtype=torch.float32)
    for causal in (False, True):
        out = local_linear_attention(q, k, v, causal=causal, ridge=1e6)
        assert relative_error(out, softmax_attention(q, k, v, causal=causal)) < 1e-5


def test_constant_values_are_reproduced():
    q, k, _ = tensors(T=40, S=40, D=8, dtype=torch.float32)
    v = torch.full((2, 2, 40, 3), 1.7)
    for options in ({"solver": "direct"}, {"solver": "cg"}, {"tol": 0.0, "max_iters": 1}):
        out = local_linear_attention(q, k, v, causal=True, ridge=0.1, **options)
        assert (out - 1.7).abs().max() < 1e-6
    double = local_linear_attention(q.double(), k.double(), v.double(), causal=True, ridge=0.1)
    assert (double - v.double()[:, :1, :, :]).abs().max() < 1e-11


def test_affine_values_are_reproduced():
    D = 6
    q, k, _ = tensors(1, H=2, T=4 * D, S=4 * D, D=D)
    generator = torch.Generator().manual_seed(4)
    M = torch.randn(D, 3, generator=generator, dtype=torch.float64)
    v, expected = k @ M + 2, q @ M + 2
    out = local_linear_attention(q, k, v, causal=True, ridge=1e-8, max_iters=100)
    assert (out - expected)[:, :, 2 * D - 1 :].abs().max() < 1e-5


@pytest.mark.parametrize("max_iters", [None, 1])
def test_weights(max_iters: int | None):
    q, k, v = tensors(T=20, S=20, dtype=torch.float32)
    options = {"causal": True, "ridge": 0.1, "solver": "cg", "max_iters": max_iters}
    # Stop after so many, without a rescue; or where forms agree to more digits than are compared.
    options["tol"] = 0.0 if max_iters else 1e-6
    weights = local_linear_weights(q, k, **options)
    assert (weights.sum(-1) - 1).abs().max() < 1e-5
    out = local_linear_attention(q, k, v, **options)
    assert relative_error(weights @ v.repeat_interleave(2, 1), out) < 1e-5
    assert (weights.triu(1) == 0).all()
    assert weights.min() < 0  # signed
    assert torch.equal(out[:, :, 0], v.repeat_interleave(2, 1)[:, :, 0])


def test_slope_is_that_of_the_fit():
    q, k, v = tensors(T=30, S=30)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.8
    for mode in ("relative", "absolute"):
        options = {"causal": True, "ridge": 0.2, "ridge_mode": mode, "key_mask": mask}
        slope = local_linear_slope(q, k, v, **options)
        assert slope.shape == (2, 4, 30, 3, 5)
        # out = vbar + W (q - kbar), with the softmax averages of values and keys
        vbar = softmax_attention(q, k, v, causal=True, key_mask=mask)
        kbar = softmax_attention(q, k, k, causal=True, key_mask=mask)
        some = (mask.cumsum(1) > 0)[:, None, :, None]
        step = torch.where(some, q - kbar, 0.0)
        expected = vbar + (slope @ step[..., None])[..., 0]
        assert relative_error(local_linear_attention(q, k, v, **options), expected) < 1e-10


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [200, 384])
@pytest.mark.parametrize("options", [{"solver": "cg", "tol": 1e-6}, {"solver": "direct"}], ids=str)
@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_common_offset_costs_nothing(impl: str, options: dict[str, Any], n: int, causal: bool):
    """Around the query instead of a key, the same arithmetic in float32 is wrong by 5e-5.

    A causal call is centred on its first key, as no later one may be looked at: what the rounding
    of the mean key leaves in covariances and weights, 2e-5, is taken off again.
    """
    options = {"causal": causal, "ridge": 0.1, **options}
    for seed in range(3):
        q, k, v = of_kind("offset", n, 64, seed)
        exact = [x.double() for x in (q, k, v)]
        expected = local_linear_attention(*exact, **options | {"tol": 1e-12})
        out = local_linear_attention(q, k, v, **options, impl=impl)
        assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("options", [{"solver": "cg", "tol": 1e-6}, {"solver": "direct"}], ids=str)
def test_weights_of_a_common_offset(options: dict[str, Any]):
    q, k, v = of_kind("offset", 200, 64)
    options = {"causal": True, "ridge": 0.1, **options}
    weights = local_linear_weights(q, k, **options)
    expected = local_linear_weights(q.double(), k.double(), **options | {"tol": 1e-12})
    assert relative_error(weights @ v, expected @ v.double()) < 1e-5
    assert (weights.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_large_offset_costs_the_digits_of_the_scores(solver: str):
    q, k, v = of_kind("normal", 200, 64)
    q, k = q + 100, k + 100
    expected = local_linear_attention(q.double(), k.double(), v.double(), causal=True, ridge=0.1)
    out = local_linear_attention(q, k, v, causal=True, ridge=0.1, tol=1e-6, solver=solver)
    assert relative_error(out, expected) < 2e-4


def test_zero_decay_is_no_decay_and_decay_is_a_bias():
    q, k, v = (x.requires_grad_() for x in tensors(T=12, S=12))
    plain = local_linear_attention(q, k, v, causal=True)
    zero = local_linear_attention(q, k, v, causal=True, log_decay=torch.zeros(2, 1, 12))
    assert relative_error(zero, plain) < 1e-10
    decay = -torch.rand(2, 2, 12, dtype=torch.float64)
    decay.requires_grad_()
    biased = local_linear_attention(q, k, v, causal=True, key_bias=-decay.cumsum(2))
    decayed = local_linear_attention(q, k, v, causal=True, log_decay=decay)
    assert relative_error(decayed, biased) < 1e-9
    weight = torch.randn_like(plain)
    inputs = (q, k, v, decay)
    pairs = zip(
        torch.autograd.grad(decayed, inputs, weight),
        torch.autograd.grad(biased, inputs, weight),
        strict=True,
    )
    for a, b in pairs:
        assert relative_error(a, b) < 1e-9
