"""How local linear attention computes: tiles, memory, the future, states, packing, refusals."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from ops.samples import Largest, megabytes_over_inputs, tensors
from regard.core.budgets import relative_error
from regard.core.cache import KVCache
from regard.native import instruction_sets
from regard.ops.local_linear import LocalLinearAux, gemm, local_linear_attention, tiles
from regard.ops.local_linear.solve import Solver

INF = float("inf")


# -- the future, and masked keys -------------------------------------------------------------


@pytest.mark.parametrize("junk", [1e4, -1e30, 1e38])
@pytest.mark.parametrize("window", [None, (5, 2)])
@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("least", [1 << 10, 1 << 60])  # by oneDNN where it can, by torch
def test_future_keys_change_not_one_bit(
    junk: float, window: tuple[int, int] | None, solver: str, least: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(gemm, "LEAST", least)
    n, cut = 150, 100
    causal = window is None
    reach = 0 if causal else 2
    rows = slice(None, cut - reach)  # these see keys before `cut` only
    results = []
    for changed in (False, True):
        q, k, v = tensors(T=n, S=n, dtype=torch.float32)
        bias, decay = torch.zeros(2, 4, n), torch.full((2, 1, n), -0.01)
        if changed:
            k[:, :, cut:] = junk
            k[:, :, cut + 7 :] *= -1
            v[:, :, cut:] = junk
            bias[:, :, cut:] = 1e4
        leaves = [x.requires_grad_() for x in (q, k, v, bias, decay)]
        options = {"causal": True, "log_decay": decay} if causal else {"window": window}
        options["solver"] = solver
        out = local_linear_attention(q, k, v, key_bias=bias, ridge=0.1, **options)
        used = leaves if causal else leaves[:4]
        grads = torch.autograd.grad(out[:, :, rows].sin().sum(), used)
        results.append([out[:, :, rows], *(g[:, :, rows] for g in grads)])
        assert all(g[:, :, cut:].eq(0).all() for g in grads[1:])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("least", [1 << 10, 1 << 60])  # by oneDNN where it can, by torch
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_contents_of_masked_keys_are_never_read(
    causal: bool, least: int, impl: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gemm, "LEAST", least)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0, :5] = False
    mask[1, -5:] = False
    results = []
    for junk in (0.0, float("nan"), INF):
        q, k, v = tensors(T=40, S=40, dtype=torch.float32)
        bias, decay = torch.zeros(2, 1, 40), torch.full((2, 2, 40), -0.1)
        for x in (k, v, bias[..., None], decay[..., None]):
            x.masked_fill_(~mask[:, None, :, None], junk)
        leaves = [x.requires_grad_() for x in (q, k, v, bias, decay)]
        out = local_linear_attention(
            q, k, v, causal=causal, key_mask=mask, key_bias=bias, log_decay=decay, impl=impl
        )
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for other in results[1:]:
        for clean, dirty in zip(results[0], other, strict=True):
            assert torch.equal(clean, dirty)


def test_rows_without_keys_are_zero():
    q, k, v = (x.requires_grad_() for x in tensors(T=9, S=4))
    for mode in ("relative", "absolute"):
        out, aux = local_linear_attention(q, k, v, causal=True, ridge_mode=mode, return_aux=True)
        assert (out[:, :, :5] == 0).all()
        assert (aux.slope[:, :, :5] == 0).all()
        assert (aux.lse[:, :, :5] == -INF).all()
        assert (aux.iterations[:, :, :5] == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert (grad[:, :, :5] == 0).all()
        assert grad[:, :, 6:].abs().sum() > 0
    nobody = torch.zeros(2, 4, dtype=torch.bool)
    out = local_linear_attention(q, k, v, key_mask=nobody)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


# -- memory ----------------------------------------------------------------------------------

OP = "regard.ops.local_linear:local_linear_attention"


@pytest.mark.parametrize("backward", [False, True])
def test_peak_memory(backward: bool):
    """Below 200 MB over the inputs at 8192 tokens, where T x S alone would take 256 MB."""
    options = "causal=True, tol=0, max_iters=2"
    assert megabytes_over_inputs(OP, 8192, backward=backward, options=options) < 200


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_peak_memory_of_16384_tokens(backward: bool):
    """The same at twice the length, where T x S would take 1 GB."""
    options = "causal=True, solver='cg'"
    assert megabytes_over_inputs(OP, 16384, backward=backward, options=options, again=True) < 200


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["native", "eager"])
def test_time_grows_as_the_square_of_the_length(impl: str):
    """By 3.2 to 4.8 from 2048 to 4096 tokens: processor time, the least of runs in turns."""
    if impl == "native" and not instruction_sets():
        pytest.skip("no native library here")
    calls = []
    for n in (2048, 4096):
        q, k, v = tensors(B=1, H=1, Hk=1, T=n, S=n, D=64, Dv=64, dtype=torch.float32)
        calls.append(partial(local_linear_attention, q, k, v, causal=True, impl=impl))
    least = [INF, INF]
    with torch.inference_mode():
        for _ in range(6):
            for i, call in enumerate(calls):
                start = time.process_time()
                call()
                least[i] = min(least[i], time.process_time() - start)
    assert 3.2 < least[1] / least[0] < 4.8


@pytest.mark.slow
def test_peak_memory_of_the_direct_solver():
    options = "causal=True, solver='direct'"
    assert megabytes_over_inputs(OP, 8192, backward=True, options=options) < 200


@pytest.mark.parametrize("direct", [False, True])
def test_no_tensor_of_queries_by_keys(direct: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "PANEL", 1 << 15)
    n = 600
    q, k, v = (x.requires_grad_() for x in tensors(B=1, T=n, S=n, D=8, dtype=torch.float32))
    with Largest() as seen:
        inputs = tiles.Inputs  # the op is opaque to the mode: look inside, at what it calls
        from regard.ops.local_linear import backward, blockwise

        ridge, scale = torch.ones(1, 1, 1), torch.ones(1, 1)
        call = inputs(q, k, v, ridge, scale, None, None, None, True, (-1, -1), False)
        with torch.no_grad():
            solver = Solver(direct, 1e-4, 24)
            found = blockwise.forward(call, solver, 0)
            wanted = backward.Wanted(*[True] * 5, *[False] * 4)
            backward.backward(
                call, torch.ones_like(found.out), found.slope, found.lse, wanted, solver, 0
            )
    assert seen.elements < n * n / 4


def test_block_size_changes_only_rounding():
    q, k, v = tensors(T=70, S=90)
    whole = local_linear_attention(q, k, v, causal=True, window=(40, 0))
    for block_size in (1, 7, 64, 1000):
        out = local_linear_attention(
            q, k, v, causal=True, window=(40, 0), block_size=block_size
        )
        assert relative_error(out, whole) < 1e-11


def test_many_heads_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch):
    q, k, v = (x.requires_grad_() for x in tensors(B=3, H=6, Hk=3, T=20, S=20))
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.8
    results = []
    for panel in (1 << 22, 2 * 40 * 20, 6 * 40 * 20):  # all at once; 2 heads; 2 rows of 3 heads
        monkeypatch.setattr(tiles, "PANEL", panel)
        bias = torch.linspace(0, 1, 3 * 3 * 20).reshape(3, 3, 20).double().requires_grad_()
        decay = -torch.linspace(0, 0.1, 3 * 6 * 20).reshape(3, 6, 20).double()
        out = local_linear_attention(
            q, k, v, causal=True, key_mask=mask, key_bias=bias, log_decay=decay, block_size=20
        )
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v, bias))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(a, b) < 1e-11


# -- states, packed sequences, results -------------------------------------------------------


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_decoding_equals_the_parallel_call(mode: str):
    q, k, v = tensors(T=12, S=12, dtype=torch.float32)
    ridge, decay = torch.rand(2, 2, 12) + 0.3, -torch.rand(2, 4, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False
    options = {"causal": True, "ridge_mode": mode, "tol": 1e-6}
    whole = local_linear_attention(
        q, k, v, ridge=ridge, log_decay=decay, key_mask=mask, **options
    )
    state, outs = None, []
    for start, stop in [(0, 5), *((i, i + 1) for i in range(5, 12))]:
        at = slice(start, stop)
        out, state = local_linear_attention(
            q[:, :, at], k[:, :, at], v[:, :, at], ridge=ridge[:, :, at],
            log_decay=decay[:, :, at], key_mask=mask[:, at], state=state, return_state=True,
            **options,
        )
        outs.append(out)
    assert isinstance(state, KVCache)
    assert state.length == 12
    assert relative_error(torch.cat(outs, 2), whole) < 1e-5


def test_packed_equals_separate_in_every_result():
    q, k, v = tensors(B=1, T=15, S=15)
    ends = torch.tensor([0, 4, 4, 15], dtype=torch.int32)
    ridge = torch.rand(1, 4, 15, dtype=torch.float64) + 0.1
    out, aux = local_linear_attention(
        q, k, v, causal=True, ridge=ridge, cu_seqlens=ends, return_aux=True
    )
    for a, b in ((0, 4), (4, 15)):
        at = slice(a, b)
        one, its = local_linear_attention(
            q[:, :, at], k[:, :, at], v[:, :, at], causal=True, ridge=ridge[:, :, at],
            return_aux=True,
        )
        assert torch.equal(out[:, :, at], one)
        for packed, separate in zip(aux, its, strict=True):
            assert torch.equal(packed[:, :, at], separate)


def test_order_and_kind_of_results():
    q, k, v = (x.requires_grad_() for x in tensors())
    plain = local_linear_attention(q, k, v)
    out, state = local_linear_attention(q, k, v, return_state=True)
    assert isinstance(state, KVCache)
    assert torch.equal(out, plain)
    out, aux = local_linear_attention(q, k, v, return_aux=True)
    assert isinstance(aux, LocalLinearAux)
    assert not any(x.requires_grad for x in aux)
    assert aux.slope.shape == q.shape
    assert aux.iterations.dtype == torch.int32
    out, state, aux = local_linear_attention(q, k, v, return_state=True, return_aux=True)
    assert isinstance(state, KVCache)
    assert isinstance(aux, LocalLinearAux)
    _, dense = local_linear_attention(q, k, v, return_aux=True, impl="reference")
    assert relative_error(aux.slope, dense.slope) < 1e-10
    assert relative_error(aux.lse, dense.lse) < 1e-12


# -- derivatives and forms -------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_each_gradient_alone(index: int):
    q, k, v = tensors()
    leaves = [q, k, v, torch.rand(4, dtype=torch.float64) + 0.5]
    run = lambda: local_linear_attention(*leaves[:3], causal=True, ridge=leaves[3])  # noqa: E731
    for x in leaves:
        x.requires_grad_()
    together = torch.autograd.grad(run().sin().sum(), leaves)
    for x in leaves:
        x.requires_grad_(x is leaves[index])
    (alone,) = torch.autograd.grad(run().sin().sum(), leaves[index])
    assert relative_error(alone, together[index]) < 1e-13


def test_double_backward_raises_except_in_the_reference():
    q, k, v = (x.requires_grad_() for x in tensors(T=4, S=4))
    out = local_linear_attention(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()
    out = local_linear_attention(q, k, v, impl="reference")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    grad.sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


def test_explain_runs_nothing():
    q, k, v = tensors()
    _, state = local_linear_attention(q, k, v, return_state=True)
    told = regard.explain(local_linear_attention, q, k, v, state=state)
    assert told.form == "blockwise"
    assert told.reasons["reference"] == "it keeps no state"
    local_linear_attention(q, k, v, state=state)  # asking did not continue the state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ridge must be a finite number above 0.0, got 0.0"),
        ({"ridge": torch.ones(3)}, r"of shape \[\], \[4\] or \[2, 1 or 2 or 4, 9\], got float32"),
        ({"ridge": torch.ones(2, 3, 9)}, r"ridge must be of shape \[\], \[4\] or \[2, 1 or 2 or 4"),
        ({"ridge": torch.ones(2, 9)}, r"ridge must be of shape \[\], \[4\] or \[2, 1 or 2"),
        ({"ridge": torch.tensor(1)}, "ridge must be a floating-point tensor"),
        ({"solver": "cgg"}, "solver must be one of 'auto', 'direct', 'cg', got 'cgg'"),
        ({"ridge_mode": "relativ"}, "did you mean 'relative'?"),
        ({"tol": -1.0}, "tol must be a finite number of at least 0"),
        ({"tol": "small"}, "tol must be a number of at least 0"),
        ({"tol_backward": INF}, "tol_backward must be"),
        ({"max_iters": 0}, "max_iters must be an int of at least 1, got 0"),
        ({"block_size": 2.5}, "block_size must be an int of at least 1, got 2.5"),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"log_decay": torch.zeros(2, 3, 9)}, "log_decay must be of shape"),
        ({"state": 3}, "state must be None or a KVCache"),
        ({"impl": "native"}, "impl='native' cannot serve this call"),
        ({"impl": "reference", "return_state": True}, "reference: it keeps no state"),
        ({"impl": "reference", "solver": "cg"}, "reference: it has no blocks .* with solver"),
        ({"impl": "reference", "tol": 1e-4}, "reference: it has no blocks .* with tol"),
        ({"impl": "reference", "tol_backward": 1e-4}, "it has no blocks .* with tol_backward"),
        ({"impl": "reference", "max_iters": 1}, "reference: it has no blocks .* with max_iters"),
        ({"impl": "reference", "block_size": 3}, "reference: it has no blocks .* with block_size"),
    ],
)
def test_refusals(options: dict, message: str):
    q, k, v = tensors()
    with pytest.raises((ValueError, TypeError), match=f"local_linear_attention: .*{message}"):
        local_linear_attention(q, k, v, **options)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_a_ridge_of_no_axes_is_the_number_it_holds(impl: str, mode: str):
    q, k, v = tensors(T=6, S=6)
    one = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    per_head = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    call = partial(local_linear_attention, q, k, v, causal=True, ridge_mode=mode, impl=impl)
    out = call(ridge=one)
    assert relative_error(out, call(ridge=0.3)) < 1e-12
    (got,) = torch.autograd.grad(out.square().sum(), one)
    (wanted,) = torch.autograd.grad(call(ridge=per_head).square().sum(), per_head)
    assert got.shape == ()
    assert relative_error(got, wanted.sum()) < 1e-10


@pytest.mark.parametrize("axis", [0, 2])
def test_vmap_equals_a_loop(axis: int):
    q, k, v = tensors(B=6, T=7, S=8)
    split = lambda x: x.unflatten(0, (3, 2)).movedim(0, axis)  # noqa: E731
    ridge = torch.rand(3, 4, dtype=torch.float64) + 0.2
    bias = torch.rand(2, 2, 8, dtype=torch.float64)

    def one(q, k, v, ridge):
        return local_linear_attention(q, k, v, causal=True, ridge=ridge, key_bias=bias)

    mapped = torch.vmap(one, in_dims=(axis, axis, None, 0))
    leaves = [x.requires_grad_() for x in (split(q), split(k), v[:2], ridge)]
    out = mapped(*leaves)
    parts = [one(leaves[0].select(axis, i), leaves[1].select(axis, i), leaves[2], ridge[i])
             for i in range(3)]
    assert relative_error(out, torch.stack(parts)) < 1e-12
    found = torch.autograd.grad(out.sin().sum(), leaves)
    wanted = torch.autograd.grad(torch.stack(parts).sin().sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-12


# -- the two products ------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("D", [16, 40])
def test_onednn_products_equal_torchs(D: int, solver: str, monkeypatch: pytest.MonkeyPatch):
    """Where the machine has them; elsewhere the two calls are the same."""
    q, k, v = tensors(B=1, H=2, Hk=2, T=700, S=700, D=D, Dv=24, dtype=torch.float32)
    assert gemm.serves(q, q.dtype, 128, 700) == gemm.available()
    assert not gemm.serves(q, torch.float64, 128, 700)
    results = []
    for least in (1 << 10, 1 << 60):
        monkeypatch.setattr(gemm, "LEAST", least)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = local_linear_attention(
            *leaves, causal=True, solver=solver, tol=1e-6, impl="eager"
        )
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 2e-5
        assert torch.equal(one, other) != gemm.available()


@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize(
    "options", [{}, {"solver": "cg"}, {"causal": False, "window": (200, 50)}], ids=str
)
def test_one_head_alone_has_the_bits_it_has_among_others(impl: str, options: dict[str, Any]):
    """Also where heads are taken together and the number of their weights is odd."""
    q, k, v = tensors(B=2, H=4, Hk=2, T=601, S=601, D=16, dtype=torch.float32)

    def attend(*inputs: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = local_linear_attention(*leaves, **{"causal": True, "impl": impl} | options)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    out, *gradients = attend(q, k, v)
    one, *own = attend(q[1:, 2:], k[1:, 1:], v[1:, 1:])
    assert torch.equal(one, out[1:, 2:])
    whole = (x[1:, -x.shape[1] // 2 :] for x in gradients)
    assert all(torch.equal(*pair) for pair in zip(own, whole, strict=True))
