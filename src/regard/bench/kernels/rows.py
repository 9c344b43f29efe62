"""What the benchmark of a kernel finds: rows, and what could not be measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from regard.bench.kernels.case import Case
from regard.bench.kernels.judge import Verdict

Met = dict[str, Any]  # quantity, value, most or least, level, met


@dataclass
class Row:
    """One case, measured.

    `seconds`: by contestant ("forward", "SDPA forward", ...), on a GPU those of the device;
    `calls`: on a GPU, of ours as a caller waits for them, the queue empty before; `numbers`: ratios
    and shares by the names that targets use. `noisy`: the sentinel moved by more than a tenth in
    every attempt, so the times decide nothing.
    """

    case: Case
    form: str
    verdicts: list[Verdict]
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    iterations: tuple[float, int] | None = None  # mean over pairs, and the most
    residual: float | None = None  # the largest
    peak_bytes: int | None = None
    sentinel_moved: float = 0.0
    noisy: bool = False

    @property
    def right(self) -> bool:
        """Whether every verdict is within its bound."""
        return all(verdict.right for verdict in self.verdicts)

    @property
    def targets(self) -> list[Met]:
        """Every target of the case with the number that was measured."""
        found = []
        for target in self.case.targets:
            value = self.numbers.get(target.quantity)
            if value is not None:
                met = target.met(value) and self.right and not self.noisy
                found.append({**asdict(target), "value": value, "met": met})
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **_described(self.case),
            "form": self.form,
            "right": self.right,
            "verdicts": [{**asdict(v), "right": v.right} for v in self.verdicts],
            "milliseconds": {name: 1e3 * s for name, s in self.seconds.items()},
            "milliseconds_of_a_call": {name: 1e3 * s for name, s in self.calls.items()},
            "runs": self.runs,
            "numbers": self.numbers,
            "iterations": self.iterations,
            "residual": self.residual,
            "peak_bytes": self.peak_bytes,
            "sentinel_moved": self.sentinel_moved,
            "noisy": self.noisy,
            "targets": self.targets,
        }


@dataclass(frozen=True)
class Left:
    """A case without a row, and why."""

    case: Case
    reason: str
    failed: bool = False  # it was begun and broke

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**_described(self.case), "reason": self.reason, "failed": self.failed}


def _described(case: Case) -> dict[str, Any]:
    names = (
        "section", "name", "mechanism", "impl", "work", "dim", "length", "ridge", "keys",
        "causal", "heads", "kv_heads", "dtype", "extra", "isa", "density", "policy", "note",
    )  # fmt: skip
    found = {name: getattr(case, name) for name in names}
    return {**found, "queries": case.rows, "options": dict(case.options), "pairs": case.pairs}
