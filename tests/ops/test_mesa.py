"""What is particular to mesa attention; the general laws are the contract's."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ops.samples import Largest, megabytes_over_inputs
from regard.core.budgets import budget, relative_error
from regard.core.state import FixedState
from regard.explain import explain
from regard.ops.delta import delta_attention
from regard.ops.linear import linear_attention
from regard.ops.linear.features import unit
from regard.ops.mesa import mesa_attention
from regard.ops.mesa.reference import mesa_attention_reference
from regard.tasks.piecewise import (
    PiecewiseRegression,
    evaluate_test_time_regression,
    strictly_causal,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SOLVERS = {"direct": {"solver": "direct"}, "cg": {"solver": "cg", "tol": 1e-14}}


def inputs(
    T: int, S: int, *, dtype=torch.float64, B=2, H=4, Hk=2, D=5, Dv=3, seed=0
) -> dict[str, Tensor]:
    """q, k, v, log_decay (with a -inf), beta and a ridge per head and channel."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    decay = -normal(B, Hk, S).abs()
    decay[:, :, S // 2 : S // 2 + 1] = -torch.inf
    made = {
        "q": normal(B, H, T, D),
        "k": normal(B, Hk, S, D),
        "v": normal(B, Hk, S, Dv),
        "log_decay": decay,
        "beta": normal(B, Hk, S).sigmoid(),
        "ridge": 0.2 + normal(H, D).abs(),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def gradients(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out).sin()
    return list(torch.autograd.grad((out * weight).sum(), tensors))


def official(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Data of the authors' operator, and the arguments in this library's layout."""
    data = load_file(GOLDEN / "mesanet" / f"{name}.safetensors")
    theirs = {"q": "q", "k": "k", "v": "v", "log_decay": "g", "beta": "beta"}
    given = {ours: data[f"in.{x}"].transpose(1, 2).contiguous() for ours, x in theirs.items()}
    given["ridge"] = data["in.lamb"]
    return data, {name: x.requires_grad_() for name, x in given.items()}


def start(data: dict[str, Tensor]) -> FixedState | None:
    if "in.h_kk_init" not in data:
        return None
    tensors = {"Hkk": data["in.h_kk_init"], "Hkv": data["in.h_kv_init"]}
    return FixedState("mesa", 0, {name: x.requires_grad_() for name, x in tensors.items()})


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["op_exact_and_cg", "op_initial_state"])
def test_equals_the_authors_exact_operator(name, solver):
    data, given = official(name)
    state = start(data)
    options = SOLVERS[solver] | {"causal": True, "chunk_size": 8, "state": state}
    out, last = mesa_attention(**given, **options, return_state=True)
    assert relative_error(out.transpose(1, 2), data["out.o"]) < budget(torch.float32)
    assert relative_error(last["Hkk"], data["out.h_kk"]) < budget(torch.float32)
    assert relative_error(last["Hkv"], data["out.h_kv"]) < budget(torch.float32)
    wanted = dict(given) if state is None else given | dict(state.tensors)
    got = torch.autograd.grad(out, list(wanted.values()), data["in.grad_o"].transpose(1, 2))
    theirs = {"log_decay": "g", "ridge": "lamb", "Hkk": "h_kk_init", "Hkv": "h_kv_init"}
    for gradient, ours in zip(got, wanted, strict=True):
        expected = data[f"grad.{theirs.get(ours, ours)}"]
        gradient = gradient.transpose(1, 2) if ours not in ("ridge", "Hkk", "Hkv") else gradient
        assert relative_error(gradient, expected) < budget(torch.float32, "gradient"), ours


@pytest.mark.parametrize("name", ["op_exact_and_cg", "op_initial_state"])
@pytest.mark.parametrize("compat", [None, "official"])
def test_equals_the_authors_decoding_step(name, compat):
    data, given = official(name)
    state = FixedState("mesa", 32, {"Hkk": data["out.h_kk"], "Hkv": data["out.h_kv"]})
    theirs = {"q": "q", "k": "k", "v": "v", "log_decay": "g", "beta": "beta"}
    step = {ours: data[f"in.step.{x}"].unsqueeze(2) for ours, x in theirs.items()}
    out, last = mesa_attention(
        **step, ridge=given["ridge"], causal=True, state=state, return_state=True, compat=compat
    )
    error = relative_error(out[:, :, 0], data["out.step.o"])
    assert error < (budget(torch.float32) if compat else 3e-3)  # the guards of the authors
    assert relative_error(last["Hkk"], data["out.step.h_kk"]) < budget(torch.float32)
    assert relative_error(last["Hkv"], data["out.step.h_kv"]) < budget(torch.float32)


@pytest.mark.parametrize("steps", [2, 5, 30])
def test_compat_equals_the_authors_iterations(steps):
    data, given = official("op_exact_and_cg")
    for chunk in (8, 64):
        out = mesa_attention(
            **given, causal=True, compat="official", max_iters=steps, chunk_size=chunk
        )
        assert relative_error(out.transpose(1, 2), data[f"out.o_cg{steps}"]) < 1e-4
    default = mesa_attention(**given, causal=True, compat="official")
    if steps == 30:
        assert torch.equal(default, out)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (70, 70), (3, 90), (80, 66), (5, 0)])
def test_both_solvers_equal_the_reference_at_every_chunk_size(solver, causal, T, S):
    given = inputs(T, S)
    expected = mesa_attention_reference(**given, causal=causal)
    names = [name for name in given if name != "log_decay"]  # -inf has no derivative there
    tensors = [given[name] for name in names]
    wanted = gradients(expected, *tensors) if S else []
    for chunk in (None, 1, 7, 1000):
        out = mesa_attention(**given, causal=causal, chunk_size=chunk, **SOLVERS[solver])
        assert relative_error(out, expected) < budget(torch.float64)
        if S:
            *got, of_decay = gradients(out, *tensors, given["log_decay"])
            for x, y in zip(got, wanted, strict=True):
                assert relative_error(x, y) < budget(torch.float64, "gradient")
            assert of_decay.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("ridge", ["number", "head", "channel"])
def test_a_ridge_of_every_kind_in_value_and_gradient(solver, ridge):
    given = inputs(20, 20)
    given["ridge"] = {
        "number": 0.7,
        "head": given["ridge"].detach()[:, 0].contiguous().requires_grad_(),
        "channel": given["ridge"],
    }[ridge]
    out = mesa_attention(**given, causal=True, **SOLVERS[solver])
    expected = mesa_attention_reference(**given, causal=True)
    assert relative_error(out, expected) < budget(torch.float64)
    if ridge != "number":
        got, wanted = (gradients(x, given["ridge"])[0] for x in (out, expected))
        assert relative_error(got, wanted) < budget(torch.float64, "gradient")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_every_input_and_the_state(solver, causal):
    given = inputs(4, 4, B=1, H=2, Hk=1, D=2, Dv=2)
    del given["log_decay"]
    given["log_decay"] = torch.linspace(-0.5, -0.1, 4).double()[None, None].requires_grad_()
    root = torch.randn(1, 1, 2, 2, dtype=torch.float64).requires_grad_()
    other = torch.randn(1, 1, 2, 2, dtype=torch.float64).requires_grad_()
    options = SOLVERS[solver] | {"causal": causal, "chunk_size": 3, "return_state": True}

    def function(root: Tensor, other: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = FixedState("mesa", 2, {"Hkk": root @ root.mT, "Hkv": other})
        out, last = mesa_attention(**dict(zip(given, tensors, strict=True)), **options, state=state)
        return out, last["Hkk"], last["Hkv"]

    assert torch.autograd.gradcheck(function, (root, other, *given.values()))


def unit_keys(T: int, D: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, T, D, generator=make, dtype=torch.float64) for _ in range(3))
    return unit(q).to(dtype), unit(k).to(dtype), v.to(dtype)


@pytest.mark.parametrize("decay", [None, 0.8, 0.99])
def test_thirty_iterations_with_relative_guards_are_exact_in_float32(decay):
    q, k, v = unit_keys(512, 64)
    a = None if decay is None else torch.full((1, 2, 512), math.log(decay))
    options = {"causal": True, "log_decay": a, "ridge": 0.25}
    thirty = mesa_attention(q, k, v, solver="cg", tol=0.0, max_iters=30, **options)
    wide = {"log_decay": None if a is None else a.double(), "causal": True, "ridge": 0.25}
    exact = mesa_attention(*(x.double() for x in (q, k, v)), solver="direct", **wide)
    assert relative_error(thirty, exact) < 1e-5
    default = mesa_attention(q, k, v, solver="cg", **options)  # tol 1e-4 of the residual
    assert relative_error(default, exact) < 2e-4
    theirs = mesa_attention(q, k, v, compat="official", **options)
    assert 1e-4 < relative_error(theirs, exact) < 1e-3
    both = (x.double() for x in (q, k, v))
    many = mesa_attention(*both, solver="cg", tol=0.0, max_iters=128, **wide)
    assert relative_error(many, exact) < 1e-8


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_do_not_depend_on_their_neighbours(solver):
    given = inputs(40, 40, dtype=torch.float32, B=1, H=1, Hk=1)
    del given["log_decay"]
    out = mesa_attention(**given, causal=True, solver=solver)
    with torch.no_grad():
        given["q"][:, :, ::2] *= 1e6
    again = mesa_attention(**given, causal=True, solver=solver)
    assert torch.equal(again[:, :, 1::2], out[:, :, 1::2])


def test_equals_least_squares_at_every_token():
    given = inputs(12, 12, B=1, H=1, Hk=1)
    q, k, v = (given[name].detach()[0, 0] for name in "qkv")
    out = mesa_attention(q[None, None], k[None, None], v[None, None], causal=True, ridge=0.3)
    for t in range(12):
        stacked = torch.cat([k[: t + 1], 0.3**0.5 * torch.eye(5, dtype=torch.float64)])
        targets = torch.cat([v[: t + 1], torch.zeros(5, 3, dtype=torch.float64)])
        fitted = torch.linalg.lstsq(stacked, targets).solution
        assert relative_error(out[0, 0, t], q[t] @ fitted) < budget(torch.float64)


def test_a_large_ridge_gives_linear_attention():
    given = inputs(30, 30)
    given.pop("ridge")
    beta = given.pop("beta")
    out = 1e6 * mesa_attention(**given, beta=beta, causal=True, ridge=1e6)
    weighted = given["v"] * beta[..., None]
    expected = linear_attention(
        given["q"], given["k"], weighted, causal=True, feature_map="identity", normalise=False,
        log_decay=given["log_decay"],
    )  # fmt: skip
    assert relative_error(out, expected) < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_token_by_token_equals_chunks_and_any_cut(solver):
    given = inputs(25, 25)
    ridge = given.pop("ridge")
    options = {"causal": True, "ridge": ridge, "return_state": True, **SOLVERS[solver]}
    whole, last = mesa_attention(**given, **options, chunk_size=8)
    for cuts in ([0, 25], [0, 11, 25], list(range(26))):
        rows, state = [], None
        for a, b in pairwise(cuts):
            piece = {name: x[:, :, a:b] for name, x in given.items()}
            out, state = mesa_attention(**piece, **options, state=state)
            rows.append(out)
        assert relative_error(torch.cat(rows, 2), whole) < budget(torch.float64)
        assert state is not None
        for name in ("Hkk", "Hkv"):
            assert relative_error(state[name], last[name]) < budget(torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chunk", [8, 64])
def test_a_later_key_changes_no_bit(solver, chunk):
    results = []
    for junk in (0.25, 1e30):
        given = inputs(40, 40, dtype=torch.float32)
        with torch.no_grad():
            given["k"][:, :, 21:], given["v"][:, :, 21:] = junk, -junk
        options = {"solver": solver, "causal": True, "chunk_size": chunk}
        out = mesa_attention(**given, **options)[:, :, :21]
        *got, of_ridge = gradients(out, *given.values())
        results.append([out, of_ridge, *(x[:, :, :21] for x in got)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("junk", [1e8, 1e20, 1e30, 1e100])
def test_no_size_of_a_later_key_reaches_the_reference(junk):
    """The systems of the rows that see it are singular, and those rows alone suffer from it."""
    results = []
    for size in (0.25, junk):
        given = inputs(7, 7)
        with torch.no_grad():
            given["k"][:, :, 4:] = size
        out = mesa_attention(**given, causal=True, impl="reference")[:, :, :4]
        results.append([out, *gradients(out, *given.values())])
    for x, y in zip(*results, strict=True):
        assert y.isfinite().all()
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_masked_keys_reach_nothing(impl):
    given = inputs(20, 20)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[1, :4] = False
    options = {"causal": True, "key_mask": mask, "impl": impl}
    out = mesa_attention(**given, **options)
    wanted = gradients(out, *given.values())
    with torch.no_grad():
        for name in ("k", "v"):
            given[name].masked_fill_(~mask[:, None, :, None], torch.nan)
        for name in ("log_decay", "beta"):
            given[name].masked_fill_(~mask[:, None], torch.nan)
    again = mesa_attention(**given, **options)
    assert torch.equal(again, out)
    assert not out[1, :, :4].any()
    for x, y in zip(gradients(again, *given.values()), wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_has_neither_a_matrix_per_token_nor_a_square_of_the_length(solver):
    n, D = 4096, 16
    q, k, v = (x[:, :1] for x in unit_keys(n, D))
    with torch.no_grad(), Largest() as largest:
        mesa_attention(q, k, v, causal=True, solver=solver)
    assert largest.elements <= 2 * n * D  # the keys beside the values


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backward", [False, True])
def test_peak_memory_of_a_process(backward: bool, solver: str):
    """At 8192 tokens of 64 channels a matrix per token would take 128 MB, T x S 256 MB."""
    op, options = "regard.ops.mesa:mesa_attention", f"causal=True, solver={solver!r}"
    grown = megabytes_over_inputs(op, 8192, backward=backward, options=options)
    assert grown < 100
    if solver == "cg":
        assert grown < 64


def test_what_a_call_keeps_for_its_backward_grows_with_its_length():
    def kept(T: int) -> int:
        q, k, v = (x[:, :1].clone().requires_grad_() for x in unit_keys(T, 16))
        stores: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            stores[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mesa_attention(q, k, v, causal=True).sum().backward()
        return sum(stores.values())

    assert kept(1024) < 4.5 * 4 * 16 * 1024  # k, beta k, v, x
    assert kept(2048) < 2.1 * kept(1024)


@pytest.mark.parametrize("decay", [None, "mesa_decay"])
def test_equals_the_predictor_of_the_regression_task(decay):
    path = GOLDEN / "regression_tasks" / "ttr_piecewise"
    args = json.loads(path.with_suffix(".json").read_text())["args"]
    data = load_file(path.with_suffix(".safetensors"))
    options = {"ridge": args["mesa_ridge"]}
    if decay:
        steps = torch.full((2, 1, 95), math.log(args[decay]), dtype=torch.float64)
        options["log_decay"] = steps
    for solver in SOLVERS.values():
        predict = strictly_causal(mesa_attention, **options, **solver)
        out = predict(data["in.x"], data["in.y"])
        expected = data["out.mesa_decay" if decay else "out.mesa"]
        assert relative_error(out, expected) < 1e-8


def test_one_segment_is_learnt_far_better_than_by_linear_attention_and_the_delta_rule():
    n, d = 512, 16
    stream = PiecewiseRegression(dim=d, segment=n, length=n).sample(
        4, torch.Generator().manual_seed(0)
    )

    def delta(beta: float):
        strengths = torch.full((4, 1, n - 1), beta, dtype=torch.float64)

        def predict(x: Tensor, y: Tensor) -> Tensor:
            q, k, v = unit(x)[:, None], x[:, None, :-1], y[:, None, :-1]
            return delta_attention(q, k, v, beta=strengths, causal=True, scale=1.0)[:, 0]

        return predict

    def linear(x: Tensor, y: Tensor) -> Tensor:
        options = {"feature_map": "identity", "normalise": False}
        seen = torch.arange(n, dtype=torch.float64).clamp(min=1)[:, None]
        return strictly_causal(linear_attention, **options)(x, y) / seen

    scores = evaluate_test_time_regression(
        {
            "mesa": strictly_causal(mesa_attention, ridge=0.1),
            "linear": linear,
            **{f"delta {beta}": delta(beta) for beta in (0.3, 0.6, 1.0)},
        },
        stream,
        baseline="mesa",
    )
    assert scores["mesa"].error < 0.02
    assert min(score.ratio for name, score in scores.items() if "delta" in name) > 3
    assert scores["linear"].ratio > 3


def test_auto_chooses_by_head_size_and_explain_tells_the_form():
    for D, solver in ((32, "direct"), (33, "cg")):
        q, k, v = unit_keys(20, D)
        auto = mesa_attention(q, k, v, causal=True)
        assert torch.equal(auto, mesa_attention(q, k, v, causal=True, solver=solver))
        whole = mesa_attention(q, k, v)
        assert torch.equal(whole, mesa_attention(q, k, v, solver="direct"))
    assert explain(mesa_attention, q, k, v).form == "encode_read"
    assert explain(mesa_attention, q, k, v, causal=True).available == ("eager", "reference")
    compat = explain(mesa_attention, q, k, v, causal=True, compat="official")
    assert compat.available == ("eager",)


def test_a_second_derivative_raises():
    given = inputs(6, 6)
    out = mesa_attention(**given, causal=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), given["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), given["v"])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("causal", [False, True])
def test_vmap_equals_a_loop(solver, causal):
    given = {name: x.detach() for name, x in inputs(9, 9).items()}
    ridge = given.pop("ridge")
    stacked = {name: torch.stack([x, x / 2], 1) for name, x in given.items()}

    def one(given: dict[str, Tensor], ridge: Tensor) -> Tensor:
        return mesa_attention(**given, ridge=ridge, causal=causal, solver=solver)

    ridges = torch.stack([ridge, 2 * ridge])
    mapped = torch.vmap(one, in_dims=(1, 0), out_dims=1)(stacked, ridges)
    looped = [one({n: x[:, i] for n, x in stacked.items()}, ridges[i]) for i in range(2)]
    assert relative_error(mapped, torch.stack(looped, 1)) < budget(torch.float64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ridge": 0.0}, ValueError, "ridge must be a finite number above 0"),
        ({"ridge": "small"}, TypeError, "ridge must be a number above 0"),
        ({"ridge": torch.ones(3)}, ValueError, r"ridge must be of shape \[\] or \[4\]"),
        ({"ridge": torch.ones(4, 6)}, ValueError, r"ridge must be of shape \[4, 5\]"),
        ({"solver": "cgs"}, ValueError, "solver must be one of 'auto', 'direct', 'cg'"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number of at least 0"),
        ({"max_iters": 0}, ValueError, "max_iters must be an int of at least 1"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size must be an int"),
        ({"beta": torch.ones(2, 4, 6)}, ValueError, "beta must be of shape"),
        ({"compat": "theirs"}, ValueError, "compat must be one of 'official'"),
        ({"compat": "official"}, ValueError, "compat must be None without causal"),
        (
            {"compat": "official", "causal": True, "solver": "direct"},
            ValueError,
            "solver must be 'auto' or 'cg' with compat='official'",
        ),
        (
            {"compat": "official", "causal": True, "tol": 1e-3},
            ValueError,
            "tol must be None with compat='official'",
        ),
        (
            {"compat": "official", "causal": True, "impl": "reference"},
            ValueError,
            "impl='reference' cannot serve this call",
        ),
        ({"impl": "reference", "solver": "cg"}, ValueError, "it has no chunks .* with solver"),
        ({"impl": "reference", "tol": 1e-3}, ValueError, "it has no chunks .* with tol"),
        ({"impl": "reference", "max_iters": 1}, ValueError, "it has no chunks .* with max_iters"),
        ({"impl": "reference", "chunk_size": 2}, ValueError, "it has no chunks .* chunk_size"),
        ({"state": FixedState("linear", 1, {})}, ValueError, "a state of mesa_attention"),
        (
            {"state": FixedState("mesa", 1, {"Hkk": torch.zeros(2, 2, 5, 5)})},
            ValueError,
            "state must be one that holds Hkk, Hkv, got one that holds Hkk",
        ),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    given = inputs(6, 6)
    with pytest.raises(error, match=f"^mesa_attention: .*{message}"):
        mesa_attention(**{**given, **changes})
