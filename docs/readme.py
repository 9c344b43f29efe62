"""Fills the tables of README.md from the cards and from benchmarks/results/compare.json.

Run: python docs/readme.py   A test holds that nothing would change.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from regard.testing import tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results/compare.json"


def filled(text: str) -> str:
    """The README with every marked part made anew."""
    parts = {
        "mechanisms": tables.table(link="docs/mechanisms/{name}.md"),
        "errors": error_table("co2"),
    }
    for name, content in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}{m[2]}", text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md must mark {name} once, found {count} marks")
    return text


def error_table(series: str) -> str:
    """Root mean squared errors of one series by forecaster and horizon, the least in bold."""
    data: dict[str, Any] = json.loads(RESULTS.read_text())["data"][series]
    errors: dict[str, dict[str, float]] = data["rmse"]
    horizons = list(next(iter(errors.values())))
    least = {h: min(row[h] for row in errors.values()) for h in horizons}
    lines = [
        "| forecaster | " + " | ".join(f"{h} ahead" for h in horizons) + " |",
        "| --- |" + " --- |" * len(horizons),
    ]
    for name, row in errors.items():
        cells = [f"**{row[h]:.3g}**" if row[h] == least[h] else f"{row[h]:.3g}" for h in horizons]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
