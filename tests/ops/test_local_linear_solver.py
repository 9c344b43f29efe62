"""How the systems of local linear attention are solved, and what happens when they cannot be."""

from __future__ import annotations

import pytest
import torch

from ops.samples import KINDS, of_kind, tensors
from regard.core.budgets import relative_error
from regard.ops.local_linear import covariance, local_linear_attention
from regard.ops.local_linear.solve import prefers_direct

SOLVERS = ("direct", "cg")


# Iterations of another implementation of the same centred systems: (kind, D, tol) and the mean
# over all queries of one causal call, of 512 tokens up to D = 32 and 1024 beyond, by the ridge.
ITERATIONS = {
    ("normal", 16, 1e-4): {0.01: 9.0, 0.1: 8.3, 1.0: 5.7, 10.0: 3.2},
    ("normal", 32, 1e-4): {0.01: 15, 0.1: 12, 1.0: 7.3, 10.0: 3.8},
    ("normal", 64, 1e-4): {0.01: 19, 0.1: 14, 1.0: 7.9, 10.0: 3.9},
    ("normal", 128, 1e-4): {0.01: 32, 0.1: 21, 1.0: 9.8, 10.0: 4.4},
    ("normal", 16, 1e-6): {0.1: 11, 1.0: 8, 10.0: 5},
    ("normal", 32, 1e-6): {0.1: 17, 1.0: 10, 10.0: 5},
    ("normal", 64, 1e-6): {0.1: 20, 1.0: 11, 10.0: 6},
    ("normal", 128, 1e-6): {0.1: 29, 1.0: 14, 10.0: 6},
    ("clustered", 16, 1e-4): {0.01: 20, 0.1: 12, 1.0: 6},
    ("clustered", 32, 1e-4): {0.01: 26, 0.1: 12, 1.0: 5},
    ("clustered", 64, 1e-4): {0.01: 20, 0.1: 8, 1.0: 4},
    ("smooth", 16, 1e-4): {0.01: 17, 0.1: 11, 1.0: 6},
    ("smooth", 32, 1e-4): {0.01: 26, 0.1: 13, 1.0: 6},
    ("smooth", 64, 1e-4): {0.01: 37, 0.1: 16, 1.0: 7},
}
# The same of large keys of very unequal channels: the mean, and the mean over blocks of 64
# queries of the slowest of each.
SHARP = {16: (10, 19), 32: (13, 32), 64: (17, 45)}


@pytest.mark.parametrize(("kind", "D", "tol"), ITERATIONS)
def test_iterations(kind: str, D: int, tol: float):
    q, k, v = of_kind(kind, 512 if D <= 32 else 1024, D)
    for ridge, count in ITERATIONS[kind, D, tol].items():
        options = {"causal": True, "ridge": ridge, "solver": "cg", "tol": tol}
        _, aux = local_linear_attention(q, k, v, **options, return_aux=True)
        assert abs(aux.iterations.double().mean() / count - 1) < 0.25, ridge


@pytest.mark.parametrize("D", SHARP)
def test_iterations_of_sharp_keys(D: int):
    q, k, v = of_kind("sharp", 512 if D <= 32 else 1024, D)
    options = {"causal": True, "ridge": 0.1, "solver": "cg", "tol": 1e-4, "max_iters": 200}
    _, aux = local_linear_attention(q, k, v, **options, return_aux=True)
    blocks = aux.iterations.double().view(-1, 64)
    for found, count in zip((blocks.mean(), blocks.amax(1).mean()), SHARP[D], strict=True):
        assert abs(found / count - 1) < 0.25


def test_residual_and_tolerance():
    q, k, v = tensors(B=1, H=1, Hk=1, T=512, S=512, D=32, dtype=torch.float32)
    double = [x.double() for x in (q, k, v)]
    for ridge in (0.1, 1.0, 10.0):
        options = {"causal": True, "ridge": ridge, "solver": "cg"}
        exact = local_linear_attention(*double, **options)
        out, aux = local_linear_attention(q, k, v, **options, return_aux=True)
        assert aux.residual.max() <= 1e-4
        assert relative_error(out, exact) < 1e-4
        tight, aux = local_linear_attention(q, k, v, **options, tol=1e-6, return_aux=True)
        assert relative_error(tight, exact) < 1e-5
        assert aux.residual.max() <= 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [30.0, 1e5])
def test_rows_do_not_depend_on_their_neighbours(solver: str, factor: float):
    """Hard rows need more iterations, or float64; the others keep every bit."""
    q, k, v = tensors(T=20, S=30, D=8, dtype=torch.float32)
    results = []
    for hard in (1.0, factor):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        leaves[0].data[:, :, 10:] *= hard
        options = {"ridge": 0.05, "solver": solver, "max_iters": 12, "return_aux": True}
        out, aux = local_linear_attention(*leaves, **options)
        grads = torch.autograd.grad(out[:, :, :10].sin().sum(), leaves)
        results.append([out[:, :, :10], grads[0][:, :, :10], *grads[1:], aux.slope[:, :, :10]])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_gradients_do_not_change_the_forward():
    q, k, v = tensors(T=50, S=50, dtype=torch.float32)
    plain = local_linear_attention(q, k, v, causal=True, ridge=0.1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.equal(local_linear_attention(*leaves, causal=True, ridge=0.1), plain)


@pytest.mark.parametrize("D", [16, 32])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sharp_keys(solver: str, mode: str, D: int):
    """Scores of a few hundred, and with an absolute ridge systems that float32 cannot hold."""
    q, k, v = tensors(T=60, S=60, D=D, dtype=torch.float32)
    spectrum = 2 * torch.logspace(0.5, -1.5, D)
    leaves = [x.requires_grad_() for x in (q * spectrum, k * spectrum, v)]
    options = {"causal": True, "ridge": 0.1, "ridge_mode": mode, "solver": solver}
    out = local_linear_attention(*leaves, **options)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *gradients))
    double = [x.detach().double() for x in leaves]
    exact, aux = local_linear_attention(*double, **options | {"solver": "direct"}, return_aux=True)
    assert relative_error(out, exact) < 1e-3  # of the weights: their scores are float32's
    if mode == "relative":
        assert (aux.residual < 1e-10).all()
    else:  # exp(-lse) is below the last digit even of float64 in some rows, and said to be
        assert 0 < (aux.residual == 1).float().mean() < 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unconverged_rows_are_solved_directly(dtype: torch.dtype):
    q, k, v = tensors(T=150, S=150, D=24, dtype=dtype)
    weight = torch.randn(q.shape[:3] + v.shape[3:], dtype=torch.float64)
    results = []
    for options in ({"solver": "direct"}, {"solver": "cg", "max_iters": 3}):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, aux = local_linear_attention(
            *leaves, causal=True, ridge=0.1, **options, return_aux=True
        )
        assert (aux.residual < 1e-4).all()
        results.append([out, *torch.autograd.grad(out, leaves, weight.to(dtype))])
    assert aux.iterations.max() == 3
    least = 1e-11 if dtype == torch.float64 else 2e-4
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < least
    stopped, aux = local_linear_attention(
        q, k, v, causal=True, ridge=0.1, solver="cg", tol=0.0, max_iters=3, return_aux=True
    )
    assert relative_error(stopped, results[0][0]) > 1e-3
    assert (aux.residual > 1e-3).any()


@pytest.mark.parametrize("D", [16, 32, 64])
@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
def test_solvers_agree(D: int, ridge: float):
    q, k, v = tensors(B=1, H=2, Hk=1, T=140, S=140, D=D, Dv=D, dtype=torch.float32)
    options = {"causal": True, "ridge": ridge}
    one = local_linear_attention(q, k, v, **options, solver="direct")
    other = local_linear_attention(q, k, v, **options, solver="cg", tol=1e-6)
    exact = local_linear_attention(*(x.double() for x in (q, k, v)), **options)
    assert relative_error(one, other) < 1e-5
    assert relative_error(one, exact) < 1e-5


def test_panels_and_pieces_change_only_rounding(monkeypatch: pytest.MonkeyPatch):
    q, k, v = tensors(B=2, H=4, Hk=2, T=40, S=90, D=12)
    whole = local_linear_attention(q, k, v, ridge=0.1, solver="direct")
    for panel, matrices in ((1 << 13, 1 << 22), (16 << 20, 1 << 11), (1 << 13, 1 << 11)):
        monkeypatch.setattr(covariance, "PANEL_BYTES", panel)
        monkeypatch.setattr(covariance, "MATRICES", matrices)
        out = local_linear_attention(q, k, v, ridge=0.1, solver="direct")
        assert relative_error(out, whole) < 1e-12


def test_auto_looks_at_metadata_and_a_number():
    def choose(dtype: torch.dtype, D: int, ridge: float, absolute: bool = False) -> bool:
        return prefers_direct(dtype, (128, 1000, D), ridge, absolute)

    assert choose(torch.float32, 16, 1.0)
    assert not choose(torch.float32, 64, 1.0)
    assert choose(torch.float32, 64, 0.001)
    assert choose(torch.float32, 64, 1.0, absolute=True)  # it shrinks with the evidence
    assert not choose(torch.bfloat16, 32, 0.1)
    assert not choose(torch.float32, 16, 10.0)
    for S, direct in ((1 << 11, True), (1 << 12, False)):  # decoding looks at the cache
        assert prefers_direct(torch.float32, (1, S, 64), 1.0, False) == direct
    q, k, v = tensors(D=20, dtype=torch.float32)
    for ridge, direct in ((0.01, True), (3.0, False), (torch.full((4,), 0.01), False)):
        _, aux = local_linear_attention(q, k, v, ridge=ridge, return_aux=True)
        assert (aux.iterations == 0).all() == direct


@pytest.mark.parametrize("solver", ["direct", "cg", "auto"])
@pytest.mark.parametrize("group", [1, 3])
def test_decoding(solver: str, group: int):
    """One query at a time by passes over the cache, and by its covariance."""
    n = 40
    q, k, v = tensors(B=1, H=2 * group, Hk=2, T=n, S=n, D=16, dtype=torch.float32)
    options = {"causal": True, "ridge": 0.3, "tol": 1e-6}
    whole = local_linear_attention(q, k, v, solver="direct", **options)
    _, state = local_linear_attention(
        q[:, :, :20], k[:, :, :20], v[:, :, :20], return_state=True, **options
    )
    for i in range(20, n):
        at = slice(i, i + 1)
        out, state, aux = local_linear_attention(
            q[:, :, at], k[:, :, at], v[:, :, at], state=state, return_state=True,
            return_aux=True, solver=solver, **options,
        )
        assert relative_error(out, whole[:, :, at]) < 1e-5
        assert (aux.iterations == 0).all() == (solver != "cg")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ridge", [0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_cost_little_more_than_their_rounding(
    kind: str, ridge: float, dtype: torch.dtype
):
    q, k, v = of_kind(kind, 200, 64)
    options = {"causal": True, "ridge": ridge}
    exact = local_linear_attention(*(x.double() for x in (q, k, v)), **options)
    rounded = [x.to(dtype) for x in (q, k, v)]
    inputs = local_linear_attention(*(x.double() for x in rounded), **options)
    out = local_linear_attention(*rounded, **options)
    assert relative_error(out, exact) < 1.5 * relative_error(inputs, exact)
