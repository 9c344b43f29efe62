"""Times of several calls taken in turns, so that whatever disturbs one disturbs all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from regard.bench.measure.clock import MOVED, REPEATS, Sentinel, Stopwatch, Timing, moved

SHORTEST = 1e-3  # seconds of one sample on a CPU: shorter calls are repeated within it
ATTEMPTS = 3
MOST_ROUNDS = 50
ENOUGH = 0.25  # seconds of rounds after which five of them will do
AHEAD = 1.5  # times what issuing a call took, and as much time more, is a GPU kept busy
LEAST_AHEAD = 1e-4  # seconds

Calls = Mapping[str, Callable[[], Any]]


def interleaved(
    calls: Calls,
    watch: Stopwatch,
    *,
    rounds: int = REPEATS,
    before: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Seconds of one call of each: the least (on a GPU the median) of at least `rounds`.

    On a GPU these are the seconds of the device: it is kept busy until the host has issued the
    call. Every call must have been made once already. `before` runs ahead of every sample and is
    not timed: on a GPU it empties the cache.

    >>> found = interleaved({"sum": lambda: sum(range(1000))}, Stopwatch())
    >>> found["sum"].seconds > 0, found["sum"].runs >= 5
    (True, True)
    """
    inner = {name: 1 if watch.cuda else _repeats(call, watch) for name, call in calls.items()}
    ahead = {
        name: AHEAD * watch.issuing(call) + LEAST_AHEAD if watch.cuda else 0.0
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent, done = 0.0, 0
    while done < rounds or (spent < ENOUGH and done < MOST_ROUNDS):
        for name, call in calls.items():
            if before is not None:
                before()
            seconds, _ = watch.once(_times(call, inner[name]), ahead[name])
            spent += seconds
            times[name].append(seconds / inner[name])
        done += 1
    best = statistics.median if watch.cuda else min
    return {name: Timing(best(taken), len(taken)) for name, taken in times.items()}


def undisturbed(
    calls: Calls,
    watch: Stopwatch,
    sentinel: Sentinel,
    *,
    rounds: int = REPEATS,
    before: Callable[[], Any] | None = None,
    attempts: int = ATTEMPTS,
) -> tuple[dict[str, Timing], float]:
    """The same, taken again while a sentinel says that the machine was not quiet.

    Returns the times of the quietest attempt, and by what part the sentinel moved during it:
    above `clock.MOVED` the times should not be trusted.
    """
    kept: tuple[dict[str, Timing], float] | None = None
    for _ in range(attempts):
        start = sentinel.seconds()
        found = interleaved(calls, watch, rounds=rounds, before=before)
        change = moved(start, sentinel.seconds())
        if kept is None or change < kept[1]:
            kept = (found, change)
        if change <= MOVED:
            break
    assert kept is not None
    return kept


def _repeats(call: Callable[[], Any], watch: Stopwatch) -> int:
    seconds, _ = watch.once(call)
    return max(1, min(10_000, round(SHORTEST / max(seconds, 1e-7))))


def _times(call: Callable[[], Any], count: int) -> Callable[[], Any]:
    if count == 1:
        return call

    def repeat() -> None:
        for _ in range(count):
            call()

    return repeat
