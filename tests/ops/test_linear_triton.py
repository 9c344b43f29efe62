"""The Triton form of the linear engine, interpreted in float32, against eager in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.interpreter import interpreted
from regard.core.budgets import budget, relative_error
from regard.ops import linear_attention
from regard.ops.linear import triton
from regard.ops.linear.features import ELU, IDENTITY, RELU
from regard.ops.linear.forms import EAGER
from regard.ops.linear.learned_features import learned
from regard.ops.linear.problem import Problem, Solution

pytestmark = pytest.mark.requires("triton")

OP, GRADIENTS = "regard.ops:linear_attention", "gpu.interpreter:gradients"
DIFFERENTIABLE = ("q", "k", "v", "log_decay", "S", "z")


def problem(
    heads: int = 2, key_heads: int = 1, T: int = 40, S: int | None = None, D: int = 16,
    E: int = 16, batch: int = 1, seed: int = 0, decay: str = "", mask: bool = False,
    state: bool = False, causal: bool = True, feature: str = "identity",
    normaliser: Any = None, scale: Any = None, epsilon: float = 0.0, wide: bool = False,
) -> Problem:  # fmt: skip
    """One problem of float32 numbers, in float64 with `wide`; masked keys and steps are junk."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    S = T if S is None else S
    q, k, v = draw(batch, heads, T, D), draw(batch, key_heads, S, D), draw(batch, key_heads, S, E)
    maps = [{"elu": ELU, "relu": RELU}.get(feature, IDENTITY)] * 2
    dtype = torch.float64 if wide else torch.float32
    if feature.startswith("hedgehog"):
        weights = torch.eye(D) + draw(2, heads, D, D) / 10
        act, full = feature.split(":")[1], not feature.endswith("half")
        maps = [
            learned(x.to(dtype), None, act, full, False, of_queries=side == "q")
            for x, side in zip((weights[0], weights[1][:1]), "qk", strict=True)
        ]
    elif normaliser is not None and feature == "identity":
        q, k = q.abs(), k.abs()
    steps, real = None, None
    if decay:
        steps = -torch.rand(batch, key_heads, S, generator=g)
    if decay == "extreme":
        assert steps is not None
        steps[:, :, ::4], steps[:, :, 5::9], steps[:, :, S // 2] = -40.0, 0.0, -torch.inf
        steps[:, :, -1], steps[:, :, 2] = -1e4, -torch.inf
    if mask:
        real = torch.rand(batch, S, generator=g) > 0.3
        real[:, :3] = False
        k, v = (torch.where(real[:, None, :, None], x, torch.nan) for x in (k, v))
        if steps is not None:
            steps = torch.where(real[:, None], steps, torch.nan)
    F = maps[1].width(D)
    given = draw(batch, key_heads, F, E) if state else None
    total = draw(batch, key_heads, F).abs() if state and normaliser is not None else None
    tensors = [x if x is None else x.to(dtype) for x in (steps, given, total)]
    return Problem(
        q.to(dtype), k.to(dtype), v.to(dtype), causal, *maps, scale, real, tensors[0],
        normaliser=normaliser, S=tensors[1], z=tensors[2], epsilon=epsilon,
        wants_state=True,
    )  # fmt: skip


def differentiated(case: dict[str, Any], serve: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Output and state of a case, and gradients of everything that has one."""
    given = problem(**case)
    leaves = {n: x.requires_grad_() for n in DIFFERENTIABLE if (x := getattr(given, n)) is not None}
    for side in ("query_map", "key_map"):
        for weight in getattr(given, side).weights:
            leaves[side] = weight.requires_grad_()
    solution: Solution = serve(given)
    results = [x for x in solution if x is not None]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g).to(x.dtype) for x in results]
    found = torch.autograd.grad(results, list(leaves.values()), weights, allow_unused=True)
    grads = {n: x for n, x in zip(leaves, found, strict=True) if x is not None}
    return [x.detach() for x in results], grads


def by_kernels(case: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """`differentiated` in the interpreter's process."""
    return differentiated(case, triton.serve)


def check(**case: Any) -> None:
    results, grads = interpreted("ops.test_linear_triton:by_kernels", case)
    name = "chunked" if case.get("causal", True) else "encode_read"
    eager = next(form for form in EAGER if form.name == name)
    wanted, expected = differentiated({**case, "wide": True}, eager.run)
    for x, y in zip(results, wanted, strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, y) <= budget(torch.float32)
    for name, gradient in expected.items():
        found = grads[name]
        if case.get("mask") and name in ("k", "v", "log_decay"):
            real = problem(**case).key_mask
            assert real is not None
            hidden = ~real[:, None] if name == "log_decay" else ~real[:, None, :, None]
            assert not found.masked_fill(~hidden, 0.0).any()
        error = relative_error(found, gradient.masked_fill(gradient.isnan(), 0.0))
        assert error <= budget(torch.float32, "gradient") / 10, name


CASES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 1},
    "decay, state": {"decay": "smooth", "state": True, "T": 70, "heads": 1},
    "extreme decays": {"decay": "extreme", "state": True, "heads": 1},
    "everything": {
        "decay": "extreme", "state": True, "mask": True, "heads": 2, "key_heads": 1, "batch": 2,
        "feature": "elu", "normaliser": "sum", "D": 11, "E": 20,
    },
    "more keys": {"T": 20, "S": 50, "decay": "smooth", "state": True},
    "more queries": {"T": 50, "S": 20, "decay": "smooth", "feature": "elu", "normaliser": "sum"},
    "no keys": {"T": 20, "S": 0, "state": True},
    "clamp, scale": {"feature": "relu", "normaliser": 20.0, "scale": 0.5, "state": True},
    "epsilon": {"normaliser": "sum", "epsilon": 0.5},
    "scale": {"scale": 0.25},
    "hedgehog": {"feature": "hedgehog:softmax_dim", "normaliser": "sum", "decay": "smooth"},
    "two blocks": {
        "feature": "hedgehog:softmax_dim", "normaliser": "sum", "T": 50, "state": True,
        "mask": True, "key_heads": 1, "D": 11, "E": 20,
    },
    "two wide blocks": {
        "feature": "hedgehog:softmax_dim", "normaliser": "sum", "T": 50, "state": True,
        "mask": True, "heads": 1, "D": 20, "E": 18,
    },
    "two blocks, one segment": {"feature": "hedgehog:exp", "normaliser": "sum", "T": 25},
    "noncausal": {"causal": False, "T": 20, "S": 70, "decay": "extreme", "state": True},
    "noncausal, everything": {
        "causal": False, "T": 40, "S": 20, "decay": "extreme", "state": True, "mask": True,
        "heads": 2, "key_heads": 1, "batch": 2, "feature": "elu", "normaliser": "sum", "E": 5,
    },
    "few tokens, extreme decays": {"T": 8, "decay": "extreme", "state": True},
    "one token": {"T": 1, "decay": "smooth", "state": True},
    "few tokens": {
        "T": 5, "S": 7, "decay": "smooth", "state": True, "mask": True, "heads": 4,
        "key_heads": 2, "feature": "elu", "normaliser": "sum",
    },
}  # fmt: skip
SLOW: dict[str, dict[str, Any]] = {
    "wide heads": {"D": 128, "E": 64, "decay": "smooth", "T": 100},
    "wide values": {"D": 16, "E": 128, "T": 64},
    "long": {"T": 256, "decay": "smooth", "D": 32, "E": 8, "feature": "elu", "normaliser": "sum"},
    "many heads": {"heads": 8, "key_heads": 1, "decay": "smooth", "batch": 2},
    "two blocks, more keys": {
        "feature": "hedgehog:joint_softmax", "normaliser": "sum", "T": 20, "S": 90, "D": 12,
        "mask": True,
    },
    "two blocks, more queries": {
        "feature": "hedgehog:softmax_dim", "normaliser": "sum", "T": 90, "S": 20, "state": True,
    },
    "two wide blocks, one segment": {
        "feature": "hedgehog:exp", "normaliser": "sum", "T": 25, "D": 32, "state": True,
    },
    "two wide blocks, more queries": {
        "feature": "hedgehog:joint_softmax", "normaliser": "sum", "T": 90, "S": 50, "D": 18,
        "key_heads": 1, "batch": 2,
    },
    "two blocks, no keys": {
        "feature": "hedgehog:exp_dim", "normaliser": "sum", "T": 40, "S": 0, "state": True,
    },
    "noncausal hedgehog": {
        "causal": False, "feature": "hedgehog:softmax_dim", "normaliser": "sum",
    },
    "few tokens, hedgehog": {
        "T": 3, "feature": "hedgehog:exp", "normaliser": "sum", "state": True, "decay": "smooth",
    },
    "map that no kernel knows": {"feature": "hedgehog:softmax_dim", "normaliser": "sum", "D": 130},
    **{
        f"hedgehog {name}": {"feature": f"hedgehog:{name}", "normaliser": "sum"}
        for name in ("relu", "pos_elu", "exp_dim", "exp", "joint_softmax", "softmax_dim:half",
                     "exp_dim:half", "exp:half")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_eager_form(name: str) -> None:
    check(**CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_equals_the_eager_form_slow(name: str) -> None:
    check(**SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 8, 9, 16, 31, 32, 33, 65, 127, 200])
def test_any_length(length: int) -> None:
    check(heads=1, T=length, seed=length, decay="smooth", state=True)


@pytest.mark.parametrize(
    "case",
    [
        {"decay": "smooth", "feature": "elu"},
        {"feature": "hedgehog:softmax_dim"},
        {"feature": "hedgehog:softmax_dim", "D": 24},
    ],
    ids=["elu", "two blocks", "two wide blocks"],
)
def test_later_keys_change_no_bit(case: dict[str, Any]) -> None:
    case = {"T": 60, "normaliser": "sum", **case}
    (out, before), (junk, after) = (
        interpreted("ops.test_linear_triton:of_the_past", case, huge) for huge in (None, 1e15)
    )
    assert torch.equal(out, junk)
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def of_the_past(case: dict[str, Any], huge: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs before token 30 and gradients of them, with `huge` later keys and values."""
    given = problem(**case)
    k, v = given.k.clone(), given.v.clone()
    if huge is not None:
        k[:, :, 30:], v[:, :, 30:] = huge, -huge
    tensors = {"q": given.q, "k": k, "v": v, "log_decay": given.log_decay}
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if x is not None}
    past = triton.serve(given._replace(**leaves)).out[:, :, :30]
    found = torch.autograd.grad(past.square().sum(), list(leaves.values()))
    return past.detach(), {n: x[:, :, :30] for n, x in zip(leaves, found, strict=True)}


def test_the_public_function_and_packed_sequences() -> None:
    given = problem(T=30, heads=4, key_heads=2, decay="smooth")
    operands = {"q": given.q, "k": given.k, "v": given.v, "log_decay": given.log_decay}
    for x in operands.values():
        x.requires_grad_()
    weight = torch.randn(1, 4, 30, 16, generator=torch.Generator().manual_seed(2))
    ends = torch.tensor([0, 12, 12, 30], dtype=torch.int32)
    for options in ({"causal": True}, {"causal": True, "cu_seqlens": ends}, {}):
        given_options = {**options, "impl": "triton"}
        out, found = interpreted(GRADIENTS, OP, operands, given_options, weight)
        wide = {n: x.detach().double().requires_grad_() for n, x in operands.items()}
        expected = linear_attention(**wide, **options, impl="eager")
        wanted = torch.autograd.grad(expected, list(wide.values()), weight.double())
        assert relative_error(out, expected) <= budget(torch.float32)
        for x, y in zip(found.values(), wanted, strict=True):
            assert relative_error(x, y) <= budget(torch.float32, "gradient")


@pytest.mark.parametrize(
    ("case", "formed"),
    [
        ({"T": 50}, (True, True)),
        ({"T": 25}, (True, False)),  # one segment: there is nothing to sum up
        ({"T": 8}, (False, False)),  # a few tokens
        ({"T": 50, "D": 20}, (True, False)),  # wide blocks
        ({"T": 50, "decay": "smooth"}, (False, False)),
        ({"T": 50, "causal": False}, (False, False)),
    ],
)
def test_which_maps_the_kernels_form(case: dict[str, Any], formed: tuple[bool, bool]) -> None:
    case = {"feature": "hedgehog:softmax_dim", "normaliser": "sum", **case}
    assert interpreted("ops.test_linear_triton:maps_formed", case) == formed


def maps_formed(case: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the form gives the maps of queries and of keys to kernels; others would refuse."""
    given = problem(**case)
    q, k, v = given.q, given.k, given.v
    names = given.query_map.name, given.key_map.name
    maps = triton._maps(given, names)
    options = (given.causal, *names, 1.0, True, -torch.inf, 0.0, False)
    for side in range(2):
        if maps[side] is None:
            other = [None, None]
            other[side] = (given.query_map, given.key_map)[side].weights[0]
            with pytest.raises(ValueError, match="applies map_[qk]"):
                torch.ops.regard.linear_triton_fwd(
                    q, k, v, given.log_decay, None, None, None, *other, *options
                )
    return maps[0] is not None, maps[1] is not None


def test_refuses_in_words() -> None:
    given = problem(T=4)
    why = triton.refuse(given)
    assert why is not None
    assert "needs a GPU" in why
    refuse = "ops.test_linear_triton:refused"
    assert interpreted(refuse, {}, {}) is None
    for fields, words in (
        ({"chunk": 16}, "chunks are fixed"),
        ({"log_decay": torch.zeros(1, 1, 4, 16)}, "per channel"),
        ({"beta": torch.ones(1, 1, 4)}, "no delta rule"),
        ({"normaliser": 1.0, "scale": torch.ones(2)}, "a number above 0"),
        ({"v": torch.zeros(1, 1, 4, 160)}, "at most 128 channels"),
        ({"q": torch.zeros(1, 2, 4, 300)}, "at most 256 features"),
    ):
        assert words in (interpreted(refuse, {"T": 4}, fields) or "")


def refused(case: dict[str, Any], fields: dict[str, Any]) -> str | None:
    """What the form says of a problem in the interpreter's process."""
    return triton.refuse(problem(**case)._replace(**fields))


def test_the_forms_say_where_they_are_verified() -> None:
    assert [form.auto for form in triton.FORMS] == [True, False]


@pytest.mark.parametrize("name", ["everything", "noncausal", "one token", "two blocks"])
def test_the_operator_is_what_torch_is_told(name: str) -> None:
    interpreted("ops.test_linear_triton:opcheck", CASES[name])


def opcheck(case: dict[str, Any]) -> None:
    """Schema, fakes and autograd of the operators, in the interpreter's process."""
    given = problem(**{"seed": 3, **case})
    names = given.query_map.name, given.key_map.name
    tensors = [given.q, given.k, given.v, given.log_decay, given.key_mask, given.S, given.z]
    tensors += [next(iter(x.weights), None) for x in (given.query_map, given.key_map)]
    for x in tensors:
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    normalised = given.normaliser is not None
    options = (given.causal, *names, 1.0, normalised, -torch.inf, 0.0, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.regard.linear_triton_fwd, (*tensors, *options), test_utils=checks
    )
