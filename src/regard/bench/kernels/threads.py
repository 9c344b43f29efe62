"""What a second thread gains: wall time of one and of two, in turns, on an idle machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import regard
from regard.bench.kernels import judge
from regard.bench.kernels.case import Case
from regard.bench.kernels.rows import Left

ROUNDS = 9
FEWEST = 3  # rounds that make a row
PATIENCE = 30.0  # seconds, at most, that a row waits for the machine to be idle
PAUSE = 0.5  # seconds between two looks
IDLE = 1.7  # processor seconds per second of two threads that have the machine to themselves


def scaling(case: Case) -> dict[str, Any] | Left:
    """The gain from a second thread, or why it cannot be said.

    A round counts only if, just before it, two threads of a matrix product had two processors
    for themselves; with fewer than three of those there is no row. What two threads computed is
    compared with float64.
    """
    if (os.cpu_count() or 1) < 2:
        return Left(case, "this machine has one processor")
    given = case.arguments()
    try:
        form = regard.explain(case.card.op, **given, **case.options, impl=case.impl).form
    except (TypeError, ValueError) as error:
        return Left(case, str(error).splitlines()[0])
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            verdicts = _judged(case, given)
            times, disturbed = _times(case, given)
    finally:
        torch.set_num_threads(before)
    rounds = len(times[2])
    if rounds < min(FEWEST, ROUNDS):
        return Left(case, f"the machine was not idle, {disturbed} times of {disturbed + rounds}")
    one, two = min(times[1]), min(times[2])
    right = all(verdict.right for verdict in verdicts)
    gain = one / two
    return {
        "name": f"{case.name}, {case.heads} head{'s' * (case.heads > 1)}, two threads",
        "impl": case.impl,
        "form": form,
        "dim": case.dim,
        "length": case.length,
        "heads": case.heads,
        "milliseconds": {"one": 1e3 * one, "two": 1e3 * two},
        "gain": gain,
        "median_gain": statistics.median(a / b for a, b in zip(*times.values(), strict=True)),
        "rounds": rounds,
        "disturbed": disturbed,
        "right": right,
        "verdicts": [{**asdict(v), "right": v.right} for v in verdicts],
        "targets": [
            {**asdict(t), "value": gain, "met": t.met(gain) and right} for t in case.targets
        ],
    }


def _judged(case: Case, given: dict[str, Any]) -> list[judge.Verdict]:
    """The call with two threads; it warms up, too."""
    torch.set_num_threads(2)
    return judge.outputs(case, case.run(given), "cpu")


def _times(case: Case, given: dict[str, Any]) -> tuple[dict[int, list[float]], int]:
    """Seconds of one and of two threads, in turns, and how often the machine was busy."""
    times: dict[int, list[float]] = {1: [], 2: []}
    matrix, disturbed = torch.full((768, 768), 0.5), 0
    torch.set_num_threads(1)
    case.run(given)
    until = time.perf_counter() + PATIENCE
    while len(times[2]) < ROUNDS and time.perf_counter() < until:
        torch.set_num_threads(2)
        if _idle(lambda: matrix @ matrix) < IDLE:
            disturbed += 1
            time.sleep(PAUSE)
            continue
        for count in (1, 2):
            torch.set_num_threads(count)
            start = time.perf_counter()
            case.run(given)
            times[count].append(time.perf_counter() - start)
    return times, disturbed


def _idle(call: Callable[[], Any]) -> float:
    """Processor seconds per second of wall time."""
    call()
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(8):
        call()
    return (time.process_time() - used) / (time.perf_counter() - wall)
