"""Holds a card to the laws."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from regard.core.card import Card
from regard.core.patterns import Pattern
from regard.testing.law import DoesNotApply, LawBroken
from regard.testing.plan import Planner, Tier, Visit, find_laws, find_patterns
from regard.testing.report import Report, Row

EXCEPTED_BUT_HOLDS = "the law holds everywhere although the card excepts it: remove the exception"


def check(
    card: Card,
    *,
    device: str = "cpu",
    tier: Tier = "fast",
    laws: Iterable[str] | None = None,
    patterns: Iterable[Pattern | str] | None = None,
    seed: int | None = None,
) -> Report:
    """Holds a mechanism to every law that applies to it, and says how it fared.

    The laws are `regard.testing.LAWS`: what each one means is the first line of its function.
    Whether one applies follows from the card: the arguments of the op, the kind of state, the
    patterns. A broken law does not raise: read `report.ok`, print the report, or call
    `report.raise_if_failed()`.

    Args:
        card: the mechanism.
        device: where to run, "cpu" or "cuda".
        tier: "fast" (seconds: each law at one place, many of them chosen by the seed) or
            "slow" (minutes: every law on every pattern and case).
        laws: names of laws; all by default.
        patterns: `Pattern`s or their words; those of the card by default.
        seed: chooses places and values; a new one each time by default, told by the report.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, an unknown law or pattern, a device
            that is not there.

    >>> import regard
    >>> report = check(regard.mechanisms["softmax"], laws=["deterministic"], seed=0)
    >>> report.ok
    True
    """
    if not isinstance(card, Card):
        raise TypeError(f"check: card must be a regard.Card, got {type(card).__name__}")
    if tier not in ("fast", "slow"):
        raise ValueError(f"check: tier must be 'fast' or 'slow', got {tier!r}")
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"check: device must be 'cpu' or 'cuda', got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"check: device must be 'cpu' where torch finds no CUDA, got {device!r}")
    if seed is None:
        seed = time.time_ns() // 1_000_000 % 100_000
    planner = Planner(card, device, tier, seed)
    chosen, allowed = find_laws(laws), find_patterns(patterns)
    start, rows = time.process_time(), []
    for law in chosen:
        reason = law.refuses(card)
        visits = planner.visits(law, allowed)
        if reason:
            rows.append(Row(law.name, "-", "-", "does not apply", reason))
        elif visits:
            rows += judge(visits)
    return Report(card.name, device, tier, seed, tuple(rows), time.process_time() - start)


def judge(visits: list[Visit]) -> list[Row]:
    """The rows of one law: an excepted one must break at one of the places at least."""
    excepted = visits[0].subject.card.laws_except.get(visits[0].law.name)
    if excepted is None:
        return [apply(visit) for visit in visits]
    rows = []
    for visit in visits:
        row = apply(visit)
        if row.outcome == "failed":
            told = f"{excepted} ({row.detail.split(': ', 1)[-1]})"
            return [Row(row.law, row.pattern, row.case, "excepted", told, row.seconds)]
        rows.append(row)
    last = rows[-1]
    return [Row(last.law, last.pattern, last.case, "remove the exception", EXCEPTED_BUT_HOLDS)]


def apply(visit: Visit) -> Row:
    """One law on one subject; whatever it raises becomes a row."""
    law, s = visit.law, visit.subject
    start = time.process_time()

    def row(outcome, detail, error=None):
        seconds = time.process_time() - start
        return Row(law.name, s.pattern.value, s.case.name, outcome, detail, seconds, error)

    try:
        with poisoned(s.device):
            remark = law.function(s)
    except LawBroken as broken:
        return row("failed", str(broken), broken)
    except DoesNotApply as reason:
        return row("does not apply", str(reason))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = "".join(traceback.format_list(frames[-3:])).rstrip()
        return row("failed", s.message(f"{type(error).__name__}: {error}\n{where}"), error)
    return row("passed", remark or "")


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Fills new uninitialised memory with NaN, so that reading it shows; on a CPU only.

    torch does this in its deterministic mode, which on a GPU also changes algorithms.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        # torch's own remarks, which say nothing about a mechanism
        warnings.filterwarnings("ignore", module=r"torch\.")
        try:
            if device == "cpu":
                torch.use_deterministic_algorithms(True, warn_only=True)
                torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore
