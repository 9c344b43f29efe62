"""Tiles of a call in which every query sees all keys."""

from __future__ import annotations

import pytest
import torch

from ops.samples import Largest, tensors
from regard.core.budgets import budget, relative_error
from regard.explain import explain
from regard.ops.inline import inline_attention
from regard.ops.linear import linear_attention, tiled, tiles
from regard.ops.linear.problem import Problem
from regard.ops.relu_linear import relu_linear_attention

CALLS = {
    "elu": (linear_attention, {}),
    "sums": (linear_attention, {"feature_map": "identity", "normalise": False, "scale": 0.3}),
    "clamped": (relu_linear_attention, {"minimum": 60.0}),
    "relu": (relu_linear_attention, {"minimum": 0.0}),
    "inline": (inline_attention, {}),
    "inline_exp": (inline_attention, {"feature_map": "exp", "scale": 0.7}),
}
# Several batch rows in a tile, one row, several tiles of a row; the last of each is incomplete.
SHAPES = [
    {"B": 7, "T": 5, "S": 6},
    {"B": 2, "T": 40, "S": 33},
    {"B": 1, "T": 130, "S": 210},
    {"B": 2, "T": 3, "S": 200, "D": 4, "Dv": 9},
    {"B": 2, "T": 30, "S": 2},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", 512)


def masked(q: torch.Tensor, k: torch.Tensor) -> dict:
    """A mask that hides nothing: the call that the form of whole tensors serves."""
    return {"key_mask": torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_value_gradient_and_state_are_those_of_whole_tensors(name, shape):
    op, options = CALLS[name]
    q, k, v = (x.requires_grad_() for x in tensors(**shape))
    assert explain(op, q, k, v, **options).form == "tiled"
    weight = torch.randn(tensors(**shape)[0].shape[:3] + v.shape[3:]).double()

    def run(**extra):
        out, state = op(q, k, v, return_state=True, **options, **extra)
        total = (out * weight).sum() + state["S"].sin().sum()
        total = total + sum(state[n].cos().sum() for n in state.tensors if n[-4:] in ("z", "mean"))
        return out, state, torch.autograd.grad(total, (q, k, v))

    out, state, found = run()
    expected, other, wanted = run(**masked(q, k))
    assert relative_error(out, expected) < budget(torch.float64)
    for part in state.tensors:
        assert relative_error(state[part], other[part]) < budget(torch.float64), part
    for x, y in zip(found, wanted, strict=True):
        assert relative_error(x, y) < budget(torch.float64, "gradient")


@pytest.mark.parametrize("name", ["elu", "sums", "clamped"])
def test_a_state_goes_on(name):
    op, options = CALLS[name]
    q, k, v = tensors(T=40, S=50)
    _, state = op(q, k[:, :, :20], v[:, :, :20], return_state=True, **options)
    out = op(q, k[:, :, 20:], v[:, :, 20:], state=state, **options)
    assert explain(op, q, k, v, state=state, **options).form == "tiled"
    assert relative_error(out, op(q, k, v, **options)) < 1e-11


@pytest.mark.parametrize("name", CALLS)
def test_any_layout_and_16_bits(name):
    op, options = CALLS[name]
    q, k, v = tensors(T=40, S=33)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(op(*heads_last, **options), op(q, k, v, **options))
    half = [x.bfloat16() for x in (q, k, v)]
    out = op(*half, **options)
    assert out.dtype == torch.bfloat16
    exact = op(*(x.double() for x in half), **options)
    assert relative_error(out, exact) < budget(torch.bfloat16)


@pytest.mark.parametrize("name", ["elu", "sums", "clamped", "relu"])
def test_nothing_but_the_output_is_as_long_as_the_input(name):
    op, options = CALLS[name]
    q, k, v = tensors(B=1, H=2, Hk=2, T=4000, S=3000)
    with torch.no_grad(), Largest() as largest:
        op(q[:, :, :1], k, v, **options)
    assert largest.elements <= max(512, 2 * 5 * 64)


def test_mapped_over_a_further_axis():
    q, k, v = tensors(B=3, T=4, S=5)
    for op, options in CALLS.values():
        mapped = torch.vmap(lambda q, k, v, op=op, o=options: op(q[None], k[None], v[None], **o)[0])
        assert relative_error(mapped(q, k, v), op(q, k, v, **options)) < 1e-12


def test_what_tiles_do_not_serve():
    q, k, v = tensors()
    problem = Problem(q, k, v)
    assert tiled.refuse(problem) is None
    beta = torch.ones(2, 2, 9)
    for changes, reason in (
        ({"causal": True}, "causal"),
        ({"log_decay": -beta}, "it takes no log_decay"),
        ({"beta": beta}, "it takes no beta"),
        ({"chunk": 8}, "it takes no chunk_size"),
        ({"scale": torch.ones(4)}, "one scale for all heads only"),
        ({"epsilon": 1e-6}, "nothing is added to its divisor"),
        ({"key_map": problem.key_map._replace(name="hedgehog")}, "no feature map hedgehog"),
    ):
        assert reason in str(tiled.refuse(problem._replace(**changes)))
