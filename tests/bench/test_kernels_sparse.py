"""Rows of attention to chosen blocks and within windows: plans, judgement, work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regard.bench.kernels import flops, gpu, judge, sparse
from regard.bench.kernels.case import Case

BLOCKS = {"block_q": 32, "block_k": 32}
SMALL = Case(
    "test", mechanism="block_sparse", dim=8, length=300, heads=2, density=0.3, options=BLOCKS
)
WINDOW = replace(SMALL, mechanism="window", density=None, options={"window": (9, 0)})


def test_a_plan_has_its_density_and_sees_no_later_block() -> None:
    levels = sparse.operands(replace(SMALL, causal=False), "cpu")["levels"]
    assert levels.shape == (1, 2, 10, 10)
    assert (levels.sum(-1) == 3).all()
    causal = sparse.operands(SMALL, "cpu")["levels"]
    assert not causal.triu(1).any()
    assert causal.diagonal(dim1=2, dim2=3).all()
    assert causal[0, 0].sum(-1).tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, causal=False), WINDOW])
def test_rows_are_judged(case: Case) -> None:
    out = case.run(case.arguments())
    verdicts = judge.outputs(case, out, "cpu") + judge.gradients(case, "cpu")
    assert {v.quantity for v in verdicts} >= {"output", "dq", "dk", "dv"}
    assert all(v.error < 1e-5 for v in verdicts)
    wrong = judge.outputs(case, torch.zeros_like(out), "cpu")
    assert wrong[0].error > 0.5


def test_work_is_counted() -> None:
    case = replace(SMALL, causal=False, length=320)
    assert flops.forward(case, None) == pytest.approx(4 * 8 * 2 * 320 * 320 * 0.3)
    seen = sum(min(i + 1, 10) for i in range(300))
    assert flops.forward(WINDOW, None) == pytest.approx(4 * 8 * 2 * seen)


def test_rows_of_a_gpu() -> None:
    plain = Case("", impl="triton", dtype="bfloat16", heads=gpu.HEADS)
    rows = list(sparse.on_gpu(plain))
    assert {row.mechanism for row in rows} == set(sparse.MECHANISMS)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    by_name = {str(t) for row in rows for t in row.targets}
    assert "forward/flash <= 0.095 (must)" in by_name
    assert "ms of both <= 1.44 (must)" in by_name
    assert all(row in list(gpu.timed()) for row in rows)
