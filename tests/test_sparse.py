"""Plans from raw queries and keys, attention by them, and what they cost."""

from __future__ import annotations

import pytest
import torch

from ops.samples import tensors
from regard.core.budgets import relative_error
from regard.ops import softmax_attention
from regard.ops.block_sparse import BlockPlan
from regard.sparse import POLICIES, attend, density_curve, sparsify


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_plan_does_no_more_than_it_may(policy: str, causal: bool):
    q, k, v = tensors(T=512, S=512, D=8, Dv=8, dtype=torch.float32)
    exact = softmax_attention(q, k, v, causal=causal)
    errors = []
    for density in (0.3, 0.5, 0.8, 0.95):
        plan = sparsify(q, k, density=density, policy=policy, block=16, causal=causal)
        assert density - 0.12 < plan.density(causal) <= density
        errors.append(relative_error(attend(plan, q, k, v, causal=causal), exact))
    assert errors == sorted(errors, reverse=True)
    plan = sparsify(q, k, density=1.0, policy=policy, causal=causal)
    assert relative_error(attend(plan, q, k, v, causal=causal), exact) < 1e-5


@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_blocks_of_any_size(block: int):
    q, k, v = tensors(T=90, S=70, dtype=torch.float32)
    plan = sparsify(q, k, density=0.5, block=block)
    assert attend(plan, q, k, v).isfinite().all()


def test_a_saved_plan_serves_again(tmp_path):
    q, k, v = tensors(T=128, S=128)
    plan = sparsify(q, k, density=0.4, block=16)
    plan.save(tmp_path / "plan.safetensors")
    again = BlockPlan.load(tmp_path / "plan.safetensors")
    assert torch.equal(attend(again, q, k, v), attend(plan, q, k, v))
    with pytest.raises(ValueError, match="made for 128 queries"):
        attend(plan, q[:, :, :100], k, v)


def test_curve_and_picture(tmp_path):
    q, k, v = tensors(T=256, S=256, dtype=torch.float32)
    curve = density_curve(q, k, v, densities=(0.3, 0.6), block=16, repeats=1)
    assert [(p.policy, p.asked) for p in curve.points] == [
        ("pyramid", 0.3), ("pyramid", 0.6), ("binary", 0.3), ("binary", 0.6),
    ]  # fmt: skip
    assert all(p.density <= p.asked and p.attend_seconds >= 0 for p in curve.points)
    assert curve.points[0].error > curve.points[1].error > 0
    curve.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_refusals():
    q, k, v = tensors(T=32, S=32)
    for options, message in (
        ({"density": 0.0}, "density must be"),
        ({"density": 1.5}, r"density must be in \(0, 1\]"),
        ({"policy": "pyramids"}, "did you mean 'pyramid'"),
        ({"block": 0}, "block must be"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsify(q, k, **options)
    with pytest.raises(TypeError, match="attend: plan must be a BlockPlan"):
        attend(torch.ones(1), q, k, v)
