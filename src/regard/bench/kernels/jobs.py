"""Work that several processes share: whoever is free takes the next piece.

A piece is taken by making a file, which only one process can. Nothing is handed out beforehand:
pieces take a second or a minute, and nobody knows which.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from regard.bench.kernels import sparse
from regard.bench.kernels.case import Case

Learn = tuple[str, ...] | None
Check = tuple[Case, Learn]
Job = tuple[
    str, list[tuple[int, Case, Learn]]
]  # "compile" or "check"; places, cases, what to learn

CHECKS_AT_ONCE = 4  # of one set of kernels, in one process


def take(folder: Path, count: int, until: float) -> Iterator[int]:
    """Numbers below `count` that no other process has taken, up to a time of the clock.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     first = take(Path(folder), 3, time.time() + 60)
    ...     next(first), list(take(Path(folder), 3, time.time() + 60)), list(first)
    (0, [1, 2], [])
    """
    for number in range(count):
        if time.time() > until:
            return
        try:
            (folder / f"{number}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        yield number


def jobs(timed: Iterable[Case], checks: Iterable[Check]) -> list[Job]:
    """Compiling what is timed, then the checks: first one piece of every set of kernels.

    Calls that need the same kernels are one piece, or follow each other: two processes that
    begin them at once would translate the same kernels twice.
    """
    order = sorted(timed, key=lambda case: (case.work == "gradients", -case.length))
    compiled = {_kernels(case): case for case in order if case.impl != "eager"}
    heavy = sorted(compiled.values(), key=lambda case: case.work != "gradients")
    found: list[Job] = [("compile", [(-1, case, None)]) for case in heavy]
    groups: dict[Hashable, list[tuple[int, Case, Learn]]] = {}
    for place, (case, learn) in enumerate(checks):
        groups.setdefault((*_kernels(case), learn), []).append((place, case, learn))
    pieces = [
        (start, group[start : start + CHECKS_AT_ONCE])
        for group in groups.values()
        for start in range(0, len(group), CHECKS_AT_ONCE)
    ]
    return found + [("check", piece) for _, piece in sorted(pieces, key=lambda piece: piece[0])]


MANY = 2**14  # tokens: longer calls are compiled as these are


def _kernels(case: Case) -> tuple[Any, ...]:
    """What the kernels of a call may depend on: neither ridge nor keys nor density.

    What compiles a backward compiles the forward, too. FlexAttention, which is compiled beside
    ours, depends on the length.
    """
    names = ("mechanism", "dim", "dtype", "extra", "causal", "heads", "kv_heads")
    options = [str(item) for item in case.options.items() if item[0] not in ("tol", "tol_backward")]
    flexible = case.mechanism in sparse.MECHANISMS and case.options.get("block_k") == sparse.BLOCK
    length = case.length if case.fixed_state or flexible else min(case.length, MANY)
    rows = length if case.rows == case.length else case.rows
    named = [getattr(case, name) for name in names]
    decoding = case.work == "decode"
    return (*named, length, rows, decoding, case.policy is None, *options)
