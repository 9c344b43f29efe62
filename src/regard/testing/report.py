"""What a check found, as rows and as a table to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["passed", "failed", "excepted", "remove the exception", "does not apply"]
BAD: tuple[Outcome, ...] = ("failed", "remove the exception")
MARKS: dict[Outcome, str] = {
    "passed": "ok",
    "failed": "FAILED",
    "excepted": "excepted",
    "remove the exception": "FAILED",
    "does not apply": "-",
}


class CheckFailed(AssertionError):
    """A mechanism broke a law; the message is the report."""


@dataclass(frozen=True)
class Row:
    """One law on one subject. `detail` is the failure, the reason, or a remark of the law."""

    law: str
    pattern: str
    case: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong here."""
        return self.outcome not in BAD


@dataclass(frozen=True)
class Report:
    """The rows of one `check`. `str(report)` is a table; `seconds` is CPU time."""

    card: str
    device: str
    tier: str
    seed: int
    rows: tuple[Row, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every law holds, or is excepted and indeed broken."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are not ok."""
        return tuple(row for row in self.rows if not row.ok)

    def raise_if_failed(self) -> Report:
        """Raises `CheckFailed` with the report unless all is well."""
        if not self.ok:
            raise CheckFailed(str(self))
        return self

    def __str__(self) -> str:
        counts = Counter(row.outcome for row in self.rows)
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        lines = [
            f"{self.card} on {self.device}, {self.tier} tier, seed {self.seed}: "
            f"{'ok' if self.ok else 'FAILED'} ({told or 'no law was applied'}; "
            f"{self.seconds:.1f} s of CPU time)"
        ]
        table = [
            (row.law, row.pattern, row.case, MARKS[row.outcome], f"{row.seconds:.2f}", _first(row))
            for row in self.rows
        ]
        if table:
            head = ("law", "pattern", "case", "", "s", "remark")
            widths = [max(len(row[i]) for row in [head, *table]) for i in range(5)]
            for row in [head, *table]:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
                lines.append("  ".join([*cells, row[5]]).rstrip())
        for row in self.failures:
            lines += ["", row.detail]
        return "\n".join(lines)


def _first(row: Row) -> str:
    if not row.ok:
        return "see below"
    line = row.detail.split("\n", 1)[0]
    return line if len(line) <= 70 else f"{line[:69]}…"
