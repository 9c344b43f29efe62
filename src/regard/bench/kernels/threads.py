"""What a second thread gains: wall time of one and of two, in turns, on an idle machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import regard
from regard.bench.kernels.case import Case, Target

ROUNDS = 9
IDLE = 1.7  # processor seconds per second of two threads that have the machine to themselves


def scaling(case: Case, targets: dict[float, float]) -> dict[str, Any] | str:
    """The gain from a second thread, or why it cannot be said.

    `targets`: seconds of work with one thread -> gain, at least. A round counts only if, just
    before it, two threads of a matrix product had two processors for themselves.
    """
    if (os.cpu_count() or 1) < 2:
        return "this machine has one processor"
    given = case.arguments()
    try:
        regard.explain(case.card.op, **given, **case.options, impl=case.impl)
    except (TypeError, ValueError) as error:
        return str(error).splitlines()[0]
    before = torch.get_num_threads()
    times: dict[int, list[float]] = {1: [], 2: []}
    matrix, disturbed = torch.full((768, 768), 0.5), 0
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            case.run(given)
        while len(times[2]) < ROUNDS and disturbed < 3 * ROUNDS:
            torch.set_num_threads(2)
            if _idle(lambda: matrix @ matrix) < IDLE:
                disturbed += 1
                continue
            for count in (1, 2):
                torch.set_num_threads(count)
                start = time.perf_counter()
                case.run(given)
                times[count].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    if len(times[2]) < 3:
        return "the machine was not idle"
    one, two = min(times[1]), min(times[2])
    found = {
        "name": case.name + ", two threads",
        "impl": case.impl,
        "dim": case.dim,
        "length": case.length,
        "heads": case.heads,
        "milliseconds": {"one": 1e3 * one, "two": 1e3 * two},
        "gain": one / two,
        "median_gain": statistics.median(a / b for a, b in zip(*times.values(), strict=True)),
        "rounds": len(times[2]),
        "disturbed": disturbed,
        "targets": [],
    }
    for least_work, gain in sorted(targets.items(), reverse=True):
        if one >= least_work and case.impl == "native":
            target = Target("threads", least=gain)
            met = target.met(one / two)
            found["targets"] = [
                {"quantity": "threads", "most": None, "least": gain, "level": "must",
                 "value": one / two, "met": met}
            ]  # fmt: skip
            break
    return found


def _idle(call: Callable[[], Any]) -> float:
    """Processor seconds per second of wall time."""
    call()
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(8):
        call()
    return (time.process_time() - used) / (time.perf_counter() - wall)
