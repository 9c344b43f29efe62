"""What a comparison found: plain data, JSON, a table, and the forecasts themselves."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from regard.bench.compare.cost import Cost
from regard.bench.measure.plain import as_json
from regard.core.state import write_atomically

FORMAT = "regard.compare/1"
LAST_VALUE, SEASONAL, RIDGE = "last value", "seasonal naive", "ridge autoregression"
LLA = "local_linear"


@dataclass(frozen=True)
class Score:
    """The error of one horizon on the test stretch.

    `rmse` is in units of the series, `relative` is `rmse` over that of the last value (None if
    that is 0), `scored` counts the measured rows it is the mean of.
    """

    horizon: int
    rmse: float
    relative: float | None
    scored: int


@dataclass
class Entry:
    """One forecaster: how it was set, and how well it did.

    `settings` were chosen among `tried` on the validation stretch, where the geometric mean over
    horizons of its error over the last value's was `validation`; `edges` are settings at the end
    of what was tried. `form` is which form of the op ran, `deviation` its largest relative error
    against the float64 reference over the horizons. `seconds` is the time spent choosing.
    """

    name: str
    kind: Literal["mechanism", "baseline"]
    settings: dict[str, Any] = field(default_factory=dict)
    tried: int = 0
    validation: float | None = None
    edges: tuple[str, ...] = ()
    scores: list[Score] = field(default_factory=list)
    form: str | None = None
    deviation: float | None = None
    seconds: float | None = None

    def score(self, horizon: int) -> Score | None:
        """The score of one horizon, if it was reached."""
        return next((score for score in self.scores if score.horizon == horizon), None)


@dataclass(frozen=True, eq=False)
class Forecasts:
    """One horizon over the test stretch: rows, truth, which are scored, and every forecast."""

    rows: Tensor
    truth: Tensor
    scored: Tensor
    by_name: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Slopes:
    """The local map that local linear attention found at some rows of the test stretch.

    `slopes[i, l]`: by how much the forecast of `horizon` made before `rows[i]` moves with the
    value `l + 1` rows (absolute embedding: l rows) before its origin, in units of the series
    per unit. `autoregression` is the one global map, at the last row.
    """

    horizon: int
    rows: Tensor
    slopes: Tensor
    autoregression: Tensor


@dataclass
class Result:
    """What `regard.compare` returns; filled step by step, and `complete` at the end.

    `series` and `method` describe data and procedure in plain values; `entries` are ordered as
    they ran; `skipped` says why a mechanism or a cost is missing; `findings` are sentences.
    """

    series: dict[str, Any]
    method: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    complete: bool = False
    forecasts: dict[int, Forecasts] = field(default_factory=dict)
    slopes: Slopes | None = None
    times: tuple[str, ...] = ()
    values: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def horizons(self) -> tuple[int, ...]:
        """The horizons, from the nearest."""
        return tuple(self.method["horizons"])

    def entry(self, name: str) -> Entry | None:
        """The forecaster of that name, if it took part."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def cost(self, name: str) -> Cost | None:
        """What the mechanism of that name costs, if it was measured."""
        return next((cost for cost in self.costs if cost.name == name), None)

    def rmse(self, name: str, horizon: int) -> float:
        """The error of one forecaster at one horizon, in units of the series."""
        entry = self.entry(name)
        score = entry.score(horizon) if entry else None
        if score is None:
            raise KeyError(f"no score of {name!r} at horizon {horizon}")
        return score.rmse

    def best(self, horizon: int) -> str | None:
        """The forecaster with the least error at a horizon."""
        scores = [(s.rmse, e.name) for e in self.entries if (s := e.score(horizon))]
        return min(scores)[1] if scores else None

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, as plain data."""
        forecasts = {
            str(horizon): {
                "rows": f.rows.tolist(),
                "truth": [
                    value if scored else None
                    for value, scored in zip(f.truth.tolist(), f.scored.tolist(), strict=True)
                ],
                **{name: [round(x, 6) for x in p.tolist()] for name, p in f.by_name.items()},
            }
            for horizon, f in self.forecasts.items()
        }
        return {
            "format": FORMAT,
            "complete": self.complete,
            "series": self.series,
            "method": self.method,
            "forecasters": [
                {**asdict(entry), "edges": list(entry.edges)} for entry in self.entries
            ],
            "costs": [{**asdict(cost), "ratios_to_sdpa": list(cost.ratios)} for cost in self.costs],
            "skipped": self.skipped,
            "findings": self.findings,
            "forecasts": forecasts,
        }

    def to_json(self) -> str:
        """Valid JSON at any moment; numbers that are not finite become null."""
        return as_json(self.to_dict())

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()`, whole or not at all."""
        write_atomically(Path(path), (self.to_json() + "\n").encode())

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Writes a self-contained HTML page with pictures, whole or not at all."""
        from regard.bench.compare.page import render

        write_atomically(Path(path), render(self).encode())

    def __str__(self) -> str:
        from regard.bench.compare.tables import as_text

        return as_text(self)
