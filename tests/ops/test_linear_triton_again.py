"""Calls like one before go straight to recorded kernels: with a launcher that only notes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from regard import gpu
from regard.gpu import replay
from regard.ops import linear_attention
from regard.ops.linear.triton import again

pytestmark = pytest.mark.requires("triton")


class Kernels:
    """In the place of what was compiled: notes the arguments of every start."""

    def __init__(self) -> None:
        self.starts: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.starts.append(arguments)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """A machine on which every kernel can run, and does nothing."""
    from regard.ops.linear.triton import launch

    found = Kernels()
    monkeypatch.setattr(replay, "start", lambda *args, **named: found)
    monkeypatch.setattr(gpu, "refusal", lambda *args: None)
    monkeypatch.setattr(gpu, "unverified", lambda *args: None)
    monkeypatch.setattr(again, "there", lambda x: True)
    monkeypatch.setattr(launch, "PLANS", replay.Plans())
    monkeypatch.setattr(again, "_known", {})
    return found


def operands(T: int = 600) -> dict[str, Tensor]:
    q, k, v = (torch.zeros(1, 2, T, 16, dtype=torch.bfloat16) for _ in range(3))
    return {"q": q, "k": k, "v": v, "log_decay": torch.zeros(1, 1, T)}


def unchecked(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> Tensor | None:
    """The result of a call in which nothing may be chosen; None where something would be."""

    class Chooses(Exception):
        pass

    def choose(*args: Any) -> None:
        raise Chooses

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("regard.ops.linear.attend"), "choose", choose)
        try:
            return linear_attention(causal=True, **arguments)
        except Chooses:
            return None


def test_a_second_call_is_not_checked_again(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unchecked(monkeypatch, operands()) is None
    linear_attention(causal=True, **operands())
    kernels.starts.clear()
    given = operands()
    out = unchecked(monkeypatch, given)
    assert out is not None
    assert out.shape == given["v"].shape
    assert out.dtype == torch.bfloat16
    assert len(kernels.starts) == 3  # sums of segments, a scan over them, outputs
    used = [x for start in kernels.starts for x in start]
    assert all(x.data_ptr() in used for x in (*given.values(), out))


@pytest.mark.parametrize("name", ["length", "scale", "mask", "gradient", "state", "impl", "map"])
def test_any_other_call_is(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    linear_attention(causal=True, **operands())
    other: dict[str, Any] = {**operands(601 if name == "length" else 600)}
    other |= {
        "scale": {"scale": 0.5}, "state": {"return_state": True}, "impl": {"impl": "triton"},
        "mask": {"key_mask": torch.ones(1, 600, dtype=torch.bool)},
        "map": {"feature_map": "identity", "normalise": False},
    }.get(name, {})  # fmt: skip
    if name == "gradient":
        other["q"].requires_grad_()
    assert unchecked(monkeypatch, other) is None


def test_wrong_calls_still_raise(kernels: Kernels) -> None:
    linear_attention(causal=True, **operands())
    wrong = operands()
    with pytest.raises(ValueError, match="log_decay"):
        linear_attention(causal=True, **{**wrong, "log_decay": wrong["log_decay"][:, :, 1:]})
    with pytest.raises(TypeError, match="causal"):
        linear_attention(causal=1, **wrong)  # type: ignore[arg-type]
