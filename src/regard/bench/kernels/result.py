"""What the benchmark of a device found, as JSON and as a short table."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regard.bench.kernels.rows import Left, Row
from regard.bench.measure.plain import as_json
from regard.bench.report.words import aligned, milliseconds, number
from regard.bench.timing.benchmark import machine, versions
from regard.bench.timing.setting import Setting
from regard.core.state import write_atomically

FORMAT = "regard.kernels/1"


def facts(device: str) -> dict[str, Any]:
    """What the numbers are true of: machine, versions, date."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": machine(Setting(device=device)),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["machine"]["gpu_capability"] = f"{properties.major}.{properties.minor}"
        found["machine"]["gpu_processors"] = properties.multi_processor_count
    return found


@dataclass
class Result:
    """Rows that were timed, short calls that were judged, what was left out; valid at any moment.

    `fuzz`: what random calls found. `complete` at the end.
    """

    device: str
    facts: dict[str, Any]
    peak: dict[str, float] = field(default_factory=dict)  # GFLOP/s, before and after
    checks: list[Row | Left] = field(default_factory=list)
    rows: list[Row | Left] = field(default_factory=list)
    threads: list[dict[str, Any]] = field(default_factory=list)  # as `threads.scaling` has them
    fuzz: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False

    @property
    def wrong(self) -> list[str]:
        """Results outside their bounds, and calls that broke."""
        said = []
        for row in (*self.checks, *self.rows):
            if isinstance(row, Left):
                said += [f"{row.case.name}: {row.reason}"] if row.failed else []
                continue
            said += [
                f"{row.case.name}: error of {v.quantity} {v.error:.1e}, allowed {v.allowed:.1e}"
                for v in row.verdicts
                if not v.right
            ]
        said += [
            f"{row['name']}: wrong with two threads" for row in self.threads if not row["right"]
        ]
        for found in self.fuzz:
            said += [f"random {found['mechanism']}: {failure}" for failure in found["failures"]]
        return said

    @property
    def targets(self) -> list[tuple[str, dict[str, Any]]]:
        """Every target with what was measured, by the name of its row."""
        timed = [row for row in (*self.checks, *self.rows) if isinstance(row, Row)]
        found = [(row.case.name, target) for row in timed for target in row.targets]
        return found + [(row["name"], t) for row in self.threads for t in row["targets"]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "format": FORMAT,
            "complete": self.complete,
            "device": self.device,
            **self.facts,
            "seconds": self.seconds,
            "fma_peak_gflops": self.peak,
            "checks": [row.to_dict() for row in self.checks if isinstance(row, Row)],
            "rows": [row.to_dict() for row in self.rows if isinstance(row, Row)],
            "threaded": self.threads,
            "left_out": [
                row.to_dict() for row in (*self.checks, *self.rows) if isinstance(row, Left)
            ],
            "fuzz": self.fuzz,
            "wrong": self.wrong,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (as_json(self.to_dict()) + "\n").encode())


def fuzzed(found: Mapping[str, Any]) -> str:
    """What random calls found, in a sentence."""
    served = found["calls"] - sum(found["refused"].values())
    return (
        f"{served} random calls of {found['mechanism'].replace('_', ' ')}, {found['impl']}"
        + (f" on {found['isa']}" if found.get("isa") else "")
        + f", seed {found['seed']}: {len(found['failures'])} wrong"
        + (f"; {found['calls'] - served} more were refused" if served < found["calls"] else "")
    )


def line(row: Row, yardsticks: Sequence[str]) -> list[str]:
    """A timed row as the cells of a table: name, ms, ratios, ms of a call, error, share, note."""
    work = "both" if row.case.work == "gradients" else "forward"
    cells = [row.case.name, milliseconds(row.seconds[work]) if work in row.seconds else "-"]
    for name in yardsticks:
        value = row.numbers.get(f"{work}/{name}")
        cells.append("-" if value is None else f"{number(value)}x")
    waited = row.calls.get(work)
    cells.append("-" if waited is None else milliseconds(waited))
    worst = max((v.error for v in row.verdicts), default=float("nan"))
    cells.append(f"{worst:.0e}")
    cells.append("-" if row.iterations is None else f"{row.iterations[0]:.1f}")
    share = row.numbers.get("of peak")
    cells.append("-" if share is None else f"{100 * share:.0f} %")
    words = [row.form] if row.case.fixed_state else []
    words += [f"{t['quantity']} {number(t['value'])} {_bound(t)}" for t in row.targets]
    if row.case.keys == "sharp" and row.residual is not None:
        words.append(f"residual at most {row.residual:.0e}")
    if row.noisy:
        words.append(f"noisy: the sentinel moved {100 * row.sentinel_moved:.0f} %")
    if not row.right:
        words.append("WRONG")
    return [*cells, "; ".join(words)]


def columns(yardsticks: Sequence[str]) -> list[str]:
    """The heads of `line`."""
    over = [f"/ {name}" for name in yardsticks]
    return ["call", "ms", *over, "of a call", "error", "iterations", "of peak", "targets"]


def _bound(target: dict[str, Any]) -> str:
    bound = f"<= {target['most']:g}" if target["most"] is not None else f">= {target['least']:g}"
    if target["level"] == "stretch":
        return f"(stretch {bound}: {'met' if target['met'] else 'not met'})"
    return f"({bound}: {'met' if target['met'] else 'MISSED'})"


def as_text(result: Result, yardsticks: Sequence[str]) -> str:
    """The short table: where it ran, what was timed, targets, what is wrong."""
    where = result.facts["machine"]
    found = result.facts["versions"]
    lines = [
        f"{where.get('gpu') or where.get('processor') or where['architecture']}, "
        + ", ".join(f"{name} {version}" for name, version in found.items())
        + f", {result.facts['date']}"
    ]
    if result.peak:
        words = ", ".join(f"{value:.0f} {when}" for when, value in result.peak.items())
        lines.append(f"peak, GFLOP/s: {words}")
    sections: dict[str, list[Row]] = {}
    for row in result.rows:
        if isinstance(row, Row):
            sections.setdefault(row.case.section, []).append(row)
    for section, rows in sections.items():
        lines += ["", section, *aligned(columns(yardsticks), [line(r, yardsticks) for r in rows])]
    if result.threads:
        lines += ["", "two threads, wall time"]
        lines += [
            f"{row['name']}: {number(row['gain'])} times as fast, {row['rounds']} rounds, "
            f"{row['disturbed']} disturbed"
            for row in result.threads
        ]
    checks = [row for row in result.checks if isinstance(row, Row)]
    right = sum(row.right for row in checks)
    lines += ["", f"{right} of {len(checks)} short calls are right, gradients included"]
    lines += [fuzzed(found) for found in result.fuzz]
    for level, words in (("must", "targets"), ("stretch", "stretched targets")):
        met = [target["met"] for _, target in result.targets if target["level"] == level]
        if met or level == "must":
            lines.append(f"{sum(met)} of {len(met)} {words} are met")
    lines += [
        f"missed: {name}: {t['quantity']} {number(t['value'])} {_bound(t)}"
        for name, t in result.targets
        if t["level"] == "must" and not t["met"]
    ]
    left: dict[tuple[str, str], int] = {}
    for row in (*result.checks, *result.rows):
        if isinstance(row, Left) and not row.failed:
            key = (f"{row.case.section}, {row.case.impl}", row.reason)
            left[key] = left.get(key, 0) + 1
    lines += [f"left out: {what}, {count} rows: {why}" for (what, why), count in left.items()]
    lines += [f"WRONG: {words}" for words in result.wrong]
    return "\n".join([*lines, "", *summary(result)])


def summary(result: Result) -> list[str]:
    """The shortest table: by section, rows, wrong ones, and targets that are met."""
    found: dict[str, list[Any]] = {}

    def count(section: str, right: bool, targets: list[dict[str, Any]]) -> None:
        row = found.setdefault(section, [0, 0, [], [], 0])
        row[0] += 1
        row[1] += not right
        for target in targets:
            row[2 if target["level"] == "must" else 3].append(target["met"])

    for row in (*result.checks, *result.rows):
        if isinstance(row, Row):
            count(row.case.section, row.right, row.targets)
        else:
            known = found.setdefault(row.case.section, [0, 0, [], [], 0])
            known[1] += row.failed
            known[4] += not row.failed
    for row in result.threads:
        count("threads", row["right"], row["targets"])

    def share(met: list[bool]) -> str:
        return f"{sum(met)} of {len(met)}" if met else "-"

    cells = [
        [section, str(rows), str(wrong), share(must), share(stretched), str(left)]
        for section, (rows, wrong, must, stretched, left) in found.items()
    ]
    return aligned(["section", "rows", "wrong", "targets met", "stretched", "left out"], cells)
