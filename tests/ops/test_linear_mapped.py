"""Maps that the native walk applies itself: the bits of the operators that stand for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.core.budgets import relative_error
from regard.native import instruction_sets, limited_to
from regard.ops.gated_delta import gated_delta_attention
from regard.ops.hedgehog import hedgehog_attention
from regard.ops.lightning import lightning_attention
from regard.ops.linear.native import mapped
from regard.ops.relu_linear import relu_linear_attention

ISAS = instruction_sets()

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library here")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with limited_to(request.param):
        yield request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def calls(T: int) -> dict:
    q, k, v = normal(2, 4, T, 32), normal(2, 2, T, 32, seed=1), normal(2, 2, T, 24, seed=2)
    beta, decay = normal(2, 2, T, seed=3).sigmoid(), -normal(2, 1, T, seed=4).abs()
    found = {
        "gated delta": (gated_delta_attention, (q, k, v), {"beta": beta, "log_decay": decay}),
        "lightning": (lightning_attention, (q, k, v), {"log_decay": decay, "scale": 0.3}),
        "relu": (relu_linear_attention, (q, k, v), {"minimum": 3.0}),
    }
    for activation, options in (
        ("softmax_dim", {}),
        ("softmax_dim", {"full_space": False}),
        ("softmax_dim", {"skip": True}),
        ("exp_dim", {}),
        ("exp", {}),
        ("joint_softmax", {"bias": True}),
        ("pos_elu", {}),
    ):
        maps = {"map_q": normal(4, 32, 32) / 6, "map_k": normal(1, 32, 32, seed=1) / 6}
        given = dict(options)
        if given.pop("bias", False):
            maps |= {"bias_q": normal(4, seed=7), "bias_k": normal(1, 32, seed=8)}
        name = " ".join([activation, *options])
        found[name] = hedgehog_attention, (q, k, v), {"activation": activation, **maps, **given}
    return found


@pytest.mark.parametrize("name", calls(1))
@pytest.mark.parametrize("T", [3, 300])
def test_asking_for_a_gradient_changes_no_bit(isa, name, T, monkeypatch):
    op, qkv, options = calls(T)[name]
    walked = []
    plain = mapped.walk_mapped
    monkeypatch.setattr(
        mapped, "walk_mapped", lambda *x, **more: walked.append(1) or plain(*x, **more)
    )
    alone, state = op(*qkv, causal=True, return_state=True, impl="native", **options)
    assert walked  # in C
    again = [x.clone().requires_grad_() for x in qkv]
    out, other = op(*again, causal=True, return_state=True, impl="native", **options)
    assert len(walked) == 1
    assert out.requires_grad
    assert torch.equal(alone, out)
    for part in state.tensors:
        assert torch.equal(state[part], other[part]), part
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in options.items()}
    exact = op(*(x.double() for x in qkv), causal=True, impl="eager", **wide)
    assert relative_error(alone, exact) < 1e-5


def test_a_row_of_large_exponents_leaves_its_neighbours_alone(isa):
    """A row decides for itself whether it needs a shift."""
    maps = {"map_q": torch.eye(16)[None], "map_k": torch.eye(16)[None]}
    q, k, v = normal(1, 1, 40, 16), normal(1, 1, 40, 16, seed=1), normal(1, 1, 40, 8, seed=2)
    out = hedgehog_attention(q, k, v, causal=True, impl="native", **maps)
    k, q = k.clone(), q.clone()
    k[:, :, 20], q[:, :, 20] = 1e3, -1e3
    other = hedgehog_attention(q, k, v, causal=True, impl="native", **maps)
    assert torch.equal(out[:, :, :20], other[:, :, :20])
    exact = hedgehog_attention(
        *(x.double() for x in (q, k, v)), causal=True, **{n: x.double() for n, x in maps.items()}
    )
    assert relative_error(other, exact) < 1e-5


@pytest.mark.parametrize("heads", [1, 3])
def test_threads_change_no_bit(heads):
    """One head that all threads work on has its rows made beforehand, not block by block."""
    q, k, v = (normal(1, heads, 5000, 32, seed=i) for i in range(3))
    maps = {"map_q": normal(heads, 32, 32) / 6, "map_k": normal(heads, 32, 32, seed=1) / 6}
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(
                [
                    hedgehog_attention(q, k, v, causal=True, impl="native", **maps),
                    gated_delta_attention(
                        q, k, v, beta=v[..., 0].sigmoid(), log_decay=-v[..., 1].abs(),
                        causal=True, impl="native",
                    ),
                ]
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_map_that_is_learned_takes_the_operators():
    q, k, v = (normal(1, 1, 20, 16, seed=i) for i in range(3))
    weight = torch.eye(16)[None].requires_grad_()
    out = hedgehog_attention(q, k, v, map_q=weight, map_k=weight, causal=True, impl="native")
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    assert gradient.abs().sum() > 0
