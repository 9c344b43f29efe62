"""What a call started is started again on other memory, and only where calls are alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.gpu import replay
from regard.gpu.replay import Plans, Recording, alike

NAMES = ("x", "y", "out", "count", "D", "N")
KERNEL = SimpleNamespace(
    fn="a kernel",
    params=[SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in NAMES],
)


class Compiled:
    """Notes what it is started with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.calls.append((grid, *arguments))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    found = Compiled()
    monkeypatch.setattr(replay, "start", lambda *given, **named: found)
    return found


def arguments(x: Tensor, y: Tensor, out: Tensor) -> dict[str, Any]:
    return {"x": x, "y": y, "out": out, "count": 128, "D": 16, "N": 64}


def record(x: Tensor, y: Tensor) -> Recording:
    steps = Recording()
    room = steps.empty(64, 16, dtype=torch.float32, device=x.device)
    more = steps.empty(3, dtype=torch.int32, device=x.device)
    steps.start(KERNEL, 2, arguments(x, y, room), warps=4)
    steps.start(KERNEL, 5, arguments(room, y, more), warps=4)
    return steps


def test_addresses_are_filled_in(compiled: Compiled) -> None:
    x, y = torch.zeros(64, 16), torch.zeros(128, 16)
    plan = record(x, y).plan((x, y))
    assert plan is not None
    others = torch.ones(64, 16), torch.ones(128, 16)
    plan.run(others)
    (grid, *first), (other_grid, *second) = compiled.calls
    assert (grid, other_grid) == ((2, 1, 1), (5, 1, 1))
    assert first[:2] == [x.data_ptr() for x in others]
    assert first[3:] == second[3:] == [128, 16, 64]
    room, more = first[2], second[2]
    assert second[:2] == [room, others[1].data_ptr()]
    assert more - room >= 64 * 16 * 4


def test_a_tensor_of_its_own_is_not_recorded(compiled: Compiled) -> None:
    x, y = torch.zeros(64, 16), torch.zeros(128, 16)
    assert record(x, y).plan((x,)) is None


def test_what_is_only_looked_at_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "start", lambda *given, **named: None)
    x, y = torch.zeros(64, 16), torch.zeros(128, 16)
    assert record(x, y).plan((x, y)) is None


def test_who_is_alike() -> None:
    x, y = torch.zeros(8, 16), torch.zeros(8, 16)
    assert alike(x, y, None) == alike(y, x, None)
    assert alike(x, x) != alike(x, y)  # one tensor in two places
    assert alike(x) != alike(x.mT)
    assert alike(x) != alike(x.half())
    assert alike(x[:, 1:]) != alike(x[:, :15])  # not aligned alike
    assert alike(x) != alike(None)


def test_plans_are_kept_up_to_a_number(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plans, "most", 2)
    x, y = torch.zeros(64, 16), torch.zeros(128, 16)
    plans = Plans()
    for key in range(3):
        plans.keep((key,), record(x, y), (x, y))
        assert (key,) in plans
    assert len(plans) == 1
