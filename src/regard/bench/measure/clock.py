"""How long a call takes, and whether the machine was quiet while that was measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 5
MOST_REPEATS = 100
ENOUGH = 0.1  # seconds: calls shorter than a fifth of this are repeated more often
MOVED = 0.1
SENTINEL_SIZE = {"cpu": 384, "cuda": 4096}
CYCLES = 2e9  # of a GPU, a second: hardly any is faster, and on a slower one it waits longer


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and how many calls that is the least or the median of."""

    seconds: float
    runs: int


class Stopwatch:
    """Times calls with the clock that fits the device.

    One thread of a CPU: processor time, so that waiting for others does not count. Several
    threads: wall time, as processor time would be their sum. A GPU: events on its stream. On a
    CPU the least of the runs is kept, since disturbances only add; on a GPU the median.
    """

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self._clock = time.process_time if threads == 1 else time.perf_counter
        self.name = (
            "CUDA events, the median"
            if self.cuda
            else "processor time, the least"
            if threads == 1
            else "wall time, the least"
        )

    def once(self, call: Callable[[], Any], ahead: float = 0.0) -> tuple[float, Any]:
        """Seconds of one call, and what it returned.

        A GPU is first kept busy for `ahead` seconds, in which the host can issue the whole call:
        then these are the seconds of the device alone. Otherwise they are those of a call that
        finds the queue empty, from the first kernel on.
        """
        if not self.cuda:
            start = self._clock()
            found = call()
            return self._clock() - start, found
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(int(CYCLES * ahead))
        before.record()
        found = call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000, found

    def issuing(self, call: Callable[[], Any]) -> float:
        """Seconds in which the host issues a call to a GPU, without waiting for it."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return seconds

    def sample(self, call: Callable[[], Any], patience: float = float("inf")) -> Timing:
        """The least (median) of at least five runs; fewer once `patience` seconds are spent."""
        times: list[float] = []
        while len(times) < REPEATS or (sum(times) < ENOUGH and len(times) < MOST_REPEATS):
            times.append(self.once(call)[0])
            if sum(times) > patience:
                break
        return Timing(statistics.median(times) if self.cuda else min(times), len(times))


class Sentinel:
    """A matrix product that always takes the same time on a quiet machine.

    Timed before and after a measurement, it tells whether the processor was slowed down or
    sped up meanwhile: whatever moved the sentinel moved the measurement.
    """

    def __init__(self, device: str, watch: Stopwatch) -> None:
        size = SENTINEL_SIZE[torch.device(device).type]
        matrix = torch.full((size, size), 0.5, device=device)
        self._call = lambda: matrix @ matrix
        self._watch = watch
        self._call()

    def seconds(self) -> float:
        """The time it takes now."""
        return self._watch.sample(self._call).seconds


def moved(before: float, after: float) -> float:
    """The change of a sentinel, relative to before.

    >>> round(moved(1.0, 1.25), 2), round(moved(1.0, 0.75), 2)
    (0.25, 0.25)
    """
    return abs(after - before) / before if before else float("inf")
