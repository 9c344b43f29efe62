"""Kernels that a call lacks are translated at once, and started once."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regard.gpu import start as module
from regard.gpu.start import start, together


class Kernel:
    """Notes what becomes of it; translating waits at the barrier for others."""

    def __init__(self, name: str, events: list[tuple[str, str]], barrier: Barrier | None) -> None:
        self.fn, self.name, self.events, self.barrier = (name, id(events)), name, events, barrier
        self.params = [SimpleNamespace(name="count", is_constexpr=False)]
        self.known, self.broken = False, False

    def warmup(self, *, grid: tuple[int, ...], **arguments: Any) -> Any:
        if self.barrier is not None:
            self.barrier.wait(timeout=10)
        if self.broken:
            raise RuntimeError("cannot be translated")
        self.events.append(("translated", self.name))
        self.known = True
        return SimpleNamespace(_init_handles=lambda: self.events.append(("loaded", self.name)))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**arguments: Any) -> Any:
            if self.broken:
                raise RuntimeError("cannot be translated")
            if not self.known:
                self.events.append(("translated alone", self.name))
            self.events.append(("started", self.name))
            return {grid: lambda *arguments: self.events.append(("started", self.name))}

        return run


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda at: nullcontext())
    monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.setattr(module, "_compiled", {})


def call(kernels: list[Kernel]) -> str:
    for kernel in kernels:
        start(kernel, 3, {"count": 7})
    return "the result"


def test_missing_kernels_are_translated_at_once(device: None) -> None:
    events: list[tuple[str, str]] = []
    barrier = Barrier(2)  # breaks unless two are being translated at the same time
    kernels = [Kernel(name, events, barrier) for name in "abcd"]
    assert together(lambda: call([*kernels, kernels[0]])) == "the result"
    whats = [what for what, _ in events]
    assert whats[:8] == ["translated"] * 4 + ["loaded"] * 4  # which is not safe at once
    assert events[8:] == [("started", name) for name in "abcda"]
    events.clear()
    assert together(lambda: call(kernels)) == "the result"  # nothing is looked at twice now
    assert events == [("started", name) for name in "abcd"]


def test_known_kernels_are_not_started_while_others_are_translated(device: None) -> None:
    events: list[tuple[str, str]] = []
    known, new = (Kernel(name, events, None) for name in "kn")
    call([known])
    events.clear()
    together(lambda: call([known, new]))
    # Up to the first that is missing, and once more with all of them.
    assert [e for e in events if e[0] == "started"] == [
        ("started", name) for name in ("k", "k", "n")
    ]
    assert ("translated", "n") in events
    assert "translated alone" not in dict(events)


def test_a_kernel_that_cannot_be_translated_says_so(device: None) -> None:
    events: list[tuple[str, str]] = []
    good, bad = (Kernel(name, events, None) for name in "gb")
    bad.broken = True
    with pytest.raises(RuntimeError, match="cannot be translated"):
        together(lambda: call([good, bad]))
    assert module._meets.get() is None


def test_without_a_device_the_call_is_made_as_it_is() -> None:
    made: list[int] = []
    together(lambda: made.append(1))
    assert made == [1]
