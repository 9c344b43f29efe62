"""Rows of attention to chosen blocks and within windows: plans, judgement, work."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regard.bench.kernels import cpu, flops, gpu, judge, sparse
from regard.bench.kernels.case import Case
from regard.mixers import HaloAttention

ROOT = Path(__file__).parents[2]

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
    assert {row.mechanism for row in rows} == {"block_sparse", "window"}
    rows += sparse.policies_on_gpu(plain)
    assert {row.mechanism for row in rows} == set(sparse.MECHANISMS)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    by_name = {str(t) for row in rows for t in row.targets}
    assert "forward/flash <= 0.095 (must)" in by_name
    assert "ms of both <= 1.44 (must)" in by_name
    assert all(row in list(gpu.timed()) for row in rows)


def test_rows_of_a_processor() -> None:
    rows = list(sparse.on_processor(Case, "auto", True, False))
    names = [(row.section, row.name) for row in rows]
    assert len(set(names)) == len(names)
    assert all(row.targets for row in rows)
    asked = {
        (row.impl, row.length, row.density, str(target))
        for row in rows
        for target in row.targets
        if row.options.get("block_k") == sparse.SMALL_BLOCK
    }
    assert ("auto", 16384, 0.1, "SDPA/forward >= 8 (must)") in asked
    assert ("auto", 16384, 0.3, "SDPA/forward >= 3.6 (stretch)") in asked
    assert ("auto", 4096, 0.2, "SDPA/forward >= 3.75 (must)") in asked  # causal
    assert ("auto", 16384, 0.2, "SDPA/both >= 3.5 (must)") in asked
    assert ("eager", 16384, 0.3, "SDPA/forward >= 1.4 (must)") in asked
    assert set(rows) <= set(cpu.timed(["eager", "native"], "avx512"))
    assert not any(row.targets for row in sparse.on_processor(Case, "eager", False, True))


def test_lower_instruction_sets_are_measured() -> None:
    rows = [row for row in cpu.lower_sets(("avx512", "avx2", "baseline")) if row.density]
    assert {row.isa for row in rows} == {"avx2", "baseline"}
    assert {row.impl for row in rows} == {"native"}


def test_the_layer_written_out_is_the_layer() -> None:
    name = "sparse_benchmark"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "sparse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = HaloAttention(8, heads=2, block=4, halo=1)
    x = torch.randn(2, 8, 8, 12)
    torch.testing.assert_close(module.CopiedWindows(ours)(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_flex_attention_cannot_do_is_not_timed_beside_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    blocks = {"block_q": 128, "block_k": 128}
    case = replace(SMALL, length=512, causal=False, options=blocks)
    assert sparse.flex(case, case.arguments()) is not None
    assert sparse.flex(replace(case, options=BLOCKS), case.arguments()) is None
    planned = replace(case, policy="pyramid")
    assert sparse.flex(planned, planned.arguments()) is None
    window = replace(WINDOW, length=128)
    run = sparse.flex(window, window.arguments())
    given = window.arguments()
    assert run is not None
    torch.testing.assert_close(run(*(given[n] for n in "qkv")), window.run(given))
