"""Kernels compile for GPUs that are not here, within a committed budget."""

from __future__ import annotations

import json

import pytest
import torch

from gpu import budget
from regard.gpu import ahead

pytestmark = pytest.mark.requires("triton")

TASKS = [(name, target) for name in budget.subjects() for target in ahead.TARGETS]
BUDGET = json.loads(budget.FILE.read_text())


def of_toy(maxnreg: int | None = None) -> ahead.Launch:
    from gpu import toy

    x = torch.zeros(64, 64, dtype=torch.float16)
    (launch,) = ahead.launches(toy.products, x, torch.zeros(128, 64, dtype=torch.float16), maxnreg)
    return launch


def test_a_launch_is_noted_with_its_arguments_and_options() -> None:
    launch = of_toy(168)
    assert launch.name == "_kernel"
    assert launch.arguments["count"] == 128
    assert launch.arguments["D"] == 64
    assert launch.options == {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": 168}


def test_loops_are_told_apart() -> None:
    texts = ["STL", "LDL", "MOV", "LDL", "HMMA", "BRA", "STL", "BRA"]
    goals = {5: 3, 7: 1}
    code = [ahead.Instruction(i, text, goals.get(i)) for i, text in enumerate(texts)]
    assert ahead.hot_accesses(code) == (1, 1)  # the LDL in the inner loop, not the outer's


@pytest.mark.slow
@pytest.mark.parametrize("target", ahead.TARGETS)
def test_a_kernel_compiles_for_every_target(target: str) -> None:
    report = ahead.compile_for(of_toy(), target)
    assert report.tensor > 0
    assert report.hot == report.stack == 0
    assert 32 <= report.registers <= 512
    assert report.shared > 0


@pytest.mark.slow
def test_spills_in_a_loop_are_found() -> None:
    report = ahead.compile_for(of_toy(maxnreg=64), "sm_80")
    assert report.stack > 0
    assert report.hot > 0


def test_the_budget_has_every_subject() -> None:
    keys = {key.split(": ")[0] for key in BUDGET}
    assert keys == set(budget.subjects())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), TASKS, ids=lambda part: part)
def test_kernels_keep_to_their_budget(name: str, target: str) -> None:
    for key, needs in budget.measure((name, target)).items():
        assert (needs is None) == (BUDGET[key] is None), f"{key}: whether the compiler fails"
        if needs is None:
            continue
        for what, slack in budget.SLACK.items():
            assert needs[what] <= BUDGET[key][what] + slack, f"{key}: {what}"
        fits, fitted = (x["shared"] <= ahead.SHARED[target] for x in (needs, BUDGET[key]))
        assert fits == fitted, f"{key}: whether it fits into shared memory"
