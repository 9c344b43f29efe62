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


def speed_table(device: str) -> str:
    """Milliseconds and errors, forward and backward, of benchmarks/results/speed_DEVICE.json."""
    content = (ROOT / f"benchmarks/results/speed_{device}.json").read_text()
    rows: list[dict[str, Any]] = json.loads(content)["forward and backward"]["rows"]
    lengths = sorted({row["length"] for row in rows})
    names = dict.fromkeys(row["name"] for row in rows)
    lines = [
        "| attention | " + " | ".join(f"T = {length}" for length in lengths) + " | error |",
        "| --- |" + " --- |" * (len(lengths) + 1),
    ]
    for name in names:
        found = {row["length"]: row for row in rows if row["name"] == name}
        times = {n: row["seconds"] * 1e3 for n, row in found.items()}
        cells = [
            "" if n not in times else f"{times[n]:.0f}" if times[n] >= 100 else f"{times[n]:.3g}"
            for n in lengths
        ]
        worst = max(row["error"] for row in found.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {worst:.0e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
