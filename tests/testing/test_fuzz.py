"""Random calls: right ones pass, wrong ones are found and can be made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
from regard.testing import fuzz as module
from regard.testing.fuzz import fuzz


@pytest.mark.parametrize("mechanism", ["local_linear", "parallax", "softmax"])
def test_eager_forms_are_right(mechanism: str) -> None:
    found = fuzz(4, mechanism=mechanism, impl="eager", seed=5)
    assert found["failures"] == []
    assert found["refused"] == {}
    assert all(0 < share <= 1 for share in found["worst"].values())


def drawn(number: int, alike: int = 1, seed: int = 0):
    return module._drawn(regard.mechanisms["local_linear"], "cpu", seed, number, alike)


def test_a_call_is_decided_by_seed_and_number() -> None:
    _, one, dtype = drawn(7)
    _, again, same = drawn(7)
    assert dtype == same
    assert one.options == again.options
    assert all(torch.equal(one[name], again[name]) for name in one.tensors)
    sizes = {tuple(drawn(n)[1]["k"].shape) for n in range(20)}
    assert len(sizes) > 10
    patterns = {drawn(n)[0].pattern for n in range(40)}
    assert len(patterns) == len(regard.mechanisms["local_linear"].patterns)


def test_alike_calls_share_what_is_compiled() -> None:
    calls = [drawn(n, alike=10) for n in range(10)]
    assert len({dtype for _, _, dtype in calls}) == 1
    assert len({call["q"].shape[3] for _, call, _ in calls}) == 1
    assert len({frozenset(call.tensors) for _, call, _ in calls}) == 1
    assert len({call["q"].shape[2] for _, call, _ in calls}) > 3


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = regard.testing.Subject.run

    def wrong(self: Any, call: Any, **extra: Any) -> Any:
        out = right(self, call, **extra)
        return torch.where(torch.arange(out.shape[2])[:, None] == 16, 1.1 * out, out)

    monkeypatch.setattr(regard.testing.Subject, "run", wrong)
    found = fuzz(5, impl="eager", seed=2)
    assert found["failures"]
    assert "output: relative error" in found["failures"][0]
    number = int(found["failures"][0].split()[1])
    assert fuzz(1, impl="eager", seed=2, start=number)["failures"] == found["failures"][:1]


def test_refusals_are_counted() -> None:
    found = fuzz(2, mechanism="parallax", impl="triton")
    assert found["failures"] == []
    assert sum(found["refused"].values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("mechanism", "count"), [("local_linear", 1000), ("parallax", 250)])
def test_a_thousand_calls(mechanism: str, count: int) -> None:
    """Of the C form, or of the eager one where there is no compiler."""
    impl = "native" if regard.native.refusal() is None else "eager"
    found = fuzz(count, mechanism=mechanism, impl=impl, seed=20)
    assert found["failures"] == []
