"""What a benchmark found: plain data, JSON, tables, a page."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regard.bench.measure.plain import as_json
from regard.bench.timing.setting import Setting
from regard.core.state import write_atomically

FORMAT = "regard.bench/1"


@dataclass(frozen=True)
class Row:
    """One mechanism at one length.

    `seconds`: of one call, the least (on a GPU the median) of `runs`; `ratios`: that over the
    time of each of torch's kernels in the same process. `peak_bytes`: by how much memory grew at
    most over what was held with the inputs, None where the system does not tell. `error`: of the
    output against float64, relative, over what `compared` says; `gradient_error` the largest of
    those of q, k and v. `form` ran; `reasons` says of the others why not (None: it could have).
    `noisy`: the sentinel moved by more than a tenth in every attempt; `sentinel_moved`, by what
    part in the one that was kept.
    """

    name: str
    length: int
    seconds: float
    runs: int
    ratios: dict[str, float]
    peak_bytes: int | None
    error: float | None
    gradient_error: float | None
    compared: str
    form: str | None
    impl: str | None
    reasons: dict[str, str | None]
    sentinel_moved: float
    noisy: bool


@dataclass(frozen=True)
class Refusal:
    """One mechanism at one length, and why there is no number."""

    name: str
    length: int
    reason: str


@dataclass
class SpeedResult:
    """What `regard.bench.speed` returns; filled row by row, and `complete` at the end.

    `machine` and `versions` describe where it ran; `peak` is the processor's, in GFLOP/s of one
    thread before and after the whole run, {} without the native library.
    """

    setting: Setting
    names: tuple[str, ...]
    yardsticks: tuple[str, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    clock: str
    peak: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    complete: bool = False

    def row(self, name: str, length: int) -> Row | None:
        """The row of one mechanism at one length, if there is one."""
        return next((r for r in self.rows if (r.name, r.length) == (name, length)), None)

    def at(self, length: int) -> list[Row]:
        """The rows of one length, the fastest first."""
        return sorted((r for r in self.rows if r.length == length), key=lambda row: row.seconds)

    def fastest(self, length: int) -> Row | None:
        """The fastest mechanism at one length, torch's own function aside."""
        return next((row for row in self.at(length) if row.name not in self.yardsticks), None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths, from the shortest."""
        return self.setting.lengths

    @property
    def findings(self) -> list[str]:
        """The answer in sentences, one per length."""
        from regard.bench.timing.tables import findings

        return findings(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "format": FORMAT,
            "complete": self.complete,
            "versions": self.versions,
            "machine": self.machine,
            "setting": {**asdict(self.setting), "lengths": list(self.lengths)},
            "clock": self.clock,
            "fma_peak_gflops": self.peak,
            "yardsticks": list(self.yardsticks),
            "rows": [asdict(row) for row in self.rows],
            "refused": [asdict(refusal) for refusal in self.refused],
            "findings": self.findings,
        }

    def to_json(self) -> str:
        """Valid JSON at any moment; numbers that are not finite become null."""
        return as_json(self.to_dict())

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()`, whole or not at all."""
        write_atomically(Path(path), (self.to_json() + "\n").encode())

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Writes a self-contained HTML page with pictures, whole or not at all."""
        from regard.bench.timing.page import render

        write_atomically(Path(path), render(self).encode())

    def __str__(self) -> str:
        from regard.bench.timing.tables import as_text

        return as_text(self)
