"""Runs in a fresh process: one mechanism at every length.

`python -m regard.bench.timing.child` reads a JSON object on standard input and writes one JSON
object a line, a row or a refusal, as soon as it is known. The order within a row: does it fit,
which form runs, memory of the first call, sentinel, times, times of torch's own attention,
sentinel, error.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from regard.bench.measure import memory
from regard.bench.measure.clock import MOVED, Sentinel, Stopwatch, Timing, moved
from regard.bench.report.words import number
from regard.bench.timing.accuracy import accuracy
from regard.bench.timing.contestants import Contestant, yardsticks
from regard.bench.timing.fit import estimate, why_too_large
from regard.bench.timing.setting import Setting
from regard.testing.calls import Call

ATTEMPTS = 3
TOO_LONG = 15  # times the patience: a call that would take longer is not begun
WARM_UP = 64


class Measurement:
    """Measures one contestant, from the shortest length to the longest."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant, self.setting = contestant, contestant.setting
        self.patience = math.inf if self.setting.patience is None else self.setting.patience
        self.watch = Stopwatch(self.setting.device, self.setting.threads)
        self.sentinel = Sentinel(self.setting.device, self.watch)
        self.last: tuple[int, float] | None = None  # length and seconds of one call
        self.peaks: dict[int, int | None] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row or a refusal for every length."""
        lengths = sorted(self.setting.lengths)
        if self.setting.kind == "cpu" and not memory.forget_peak():
            self._memory_first(lengths)
        for length in lengths:
            try:
                reason = self._refuse(length)
                found = {"refused": reason} if reason else {"row": self._row(length)}
            except (ArithmeticError, MemoryError, NotImplementedError, RuntimeError) as error:
                found = {"refused": _words(error)}
            except (TypeError, ValueError) as error:
                found = {"refused": _words(error)}
            yield {"length": length, **found}

    def _refuse(self, length: int) -> str | None:
        """Why this length is not tried, or None."""
        card = self.contestant.card
        unfit = self.setting.why_unfit(card) if card is not None else None
        if unfit is not None:
            return unfit
        device = self.setting.device
        need = estimate(self.contestant, length)
        too_large = why_too_large(need, memory.available(device), memory.available("cpu"))
        if too_large is not None or self.last is None:
            return too_large
        before, seconds = self.last
        expected = seconds * (length / before) ** self.contestant.exponent
        if expected > TOO_LONG * self.patience:
            return (
                f"one call might take {number(expected)} s, from {number(seconds)} s at {before} "
                f"tokens; the patience is {self.patience:g} s a row"
            )
        return None

    def _memory_first(self, lengths: list[int]) -> None:
        """Where a peak cannot be forgotten: before anything larger happens in this process."""
        for length in lengths:
            if self._refuse(length) is not None:
                return
            work = self.contestant.work(self.contestant.call(length))
            try:
                self.peaks[length] = memory.growth(work)[0]
            except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError):
                return

    def _row(self, length: int) -> dict[str, Any]:
        call = self.contestant.call(length)
        ran = self.contestant.ran(call)
        work = self.contestant.work(call)
        grown, (first, out) = memory.growth(lambda: self.watch.once(work), self.setting.device)
        sample = self._times(work, first, length, call)
        judged = accuracy(self.contestant, call, out)
        self.last = (length, sample["seconds"])
        return {
            "peak_bytes": self.peaks.get(length, grown),
            **sample,
            "error": judged.error,
            "gradient_error": judged.gradient_error,
            "compared": judged.compared,
            "form": ran.form,
            "impl": ran.impl,
            "reasons": ran.reasons,
        }

    def _times(self, work: Any, first: float, length: int, call: Call) -> dict[str, Any]:
        """Times of the call and of torch's, taken again while the sentinel says it was noisy."""
        others = self._others(call)
        best: dict[str, Any] = {}
        spent = first
        for _ in range(ATTEMPTS):
            before = self.sentinel.seconds()
            timing = Timing(first, 1) if first > self.patience else self._sample(work)
            torch_times = {name: self._sample(other).seconds for name, other in others.items()}
            change = moved(before, self.sentinel.seconds())
            if not best or change < best["sentinel_moved"]:
                best = {
                    "seconds": timing.seconds,
                    "runs": timing.runs,
                    "ratios": {
                        name: timing.seconds / seconds if seconds else math.inf
                        for name, seconds in torch_times.items()
                    },
                    "sentinel_moved": change,
                    "noisy": change > MOVED,
                }
            spent += timing.seconds * timing.runs
            if not best["noisy"] or spent > self.patience or first > self.patience:
                break
        return best

    def _sample(self, work: Any) -> Timing:
        return self.watch.sample(work, self.patience)

    def _others(self, call: Call) -> dict[str, Any]:
        """Torch's own attention on the same q, k, v, each kernel that serves them."""
        found = {}
        for name in yardsticks(self.setting.kind):
            if name == self.contestant.name:
                continue
            yardstick = Contestant.named(name, self.setting)
            work = yardstick.work(call.without(*(set(call.arguments) - {"q", "k", "v"})))
            try:
                work()
            except RuntimeError:  # its own rows say why
                continue
            found[name] = work
        return found


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def main() -> None:
    """Reads, measures, writes."""
    description = json.load(sys.stdin)
    setting = Setting.of(description["setting"])
    torch.set_num_threads(setting.threads)
    if setting.kind == "cuda":
        torch.cuda.set_device(torch.device(setting.device).index or 0)
    contestant = Contestant.named(description["name"], setting)
    # What is loaded once, at the first call. If it fails, the rows will say so.
    with suppress(NotImplementedError, RuntimeError, TypeError, ValueError):
        contestant.work(contestant.call(min(WARM_UP, *setting.lengths)))()
    for found in Measurement(contestant).rows():
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
