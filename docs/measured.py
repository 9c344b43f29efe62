"""Fills docs/parallel.md and docs/which_linear.md from benchmarks/results.

`{{ parallel }}` is what benchmarks/parallel.py found on each device, `{{ which linear }}` what
benchmarks/which_linear.py found. Where there is no file yet the page says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.bench.report.words import number

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
NOT_YET = "*Not measured yet in this version.*\n"


def filled(markdown: str) -> str:
    """The page with its placeholders replaced."""
    for placeholder, make in (("{{ parallel }}", parallel), ("{{ which linear }}", which_linear)):
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, make() or NOT_YET)
    return markdown


def parallel() -> str:
    """A table for every kind of device."""
    found = sorted(RESULTS.glob("parallel_*.json"))
    return "\n".join(_devices(json.loads(path.read_text())) for path in found)


def which_linear() -> str:
    """One table, softmax first."""
    path = RESULTS / "which_linear.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    short, long = found["lengths"]
    ratios = {f"forward {short}": f"T = {short}", f"forward {long}": f"T = {long}"}
    ratios[f"both {long}"] = f"forward and backward, T = {long}"
    heads = ["mechanism", "state", "pairs recalled", "of 64"]
    heads += [f"over softmax, {words}" for words in ratios.values()]
    heads += ["one token, µs", "error", "form"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
    for row in found["rows"]:
        name = f"[{row['mechanism'].replace('_', ' ')}](mechanisms/{row['mechanism']}.md)"
        name += "".join(f", {n} = {value}" for n, value in row["options"].items())
        state = "grows" if row["state"] is None else str(row["state"])
        cells = [name, state, str(row["pairs"]), f"{100 * row['recalled_of_64']:.0f} %"]
        cells += [number(row["over_softmax"].get(ratio)) for ratio in ratios]
        cells += [number(row.get("us")), f"{row['error']:.0e}"]
        cells.append(" / ".join(dict.fromkeys(row["forms"].values())))
        lines.append("| " + " | ".join(cells) + " |")
    machine, versions = found["machine"], found["versions"]
    where = machine.get("processor") or machine["architecture"]
    if any(row["noisy"] for row in found["rows"]):
        lines += ["", "The machine was not quiet: times are indicative."]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(
        [
            *lines,
            "",
            f"{where}, {machine['instruction_sets']['torch']}; {told}; {found['date']}.",
            "",
        ]
    )


def _devices(found: dict[str, Any]) -> str:
    """One machine: what was right, and a table."""
    machine, versions = found["machine"], found["versions"]
    name = machine.get("gpu") or machine.get("processor") or machine["architecture"]
    right = sum(check["right"] for check in found["checks"])
    lines = [
        f"### {found['ranks']} of {name}\n",
        f"{', '.join(f'{n} {v}' for n, v in versions.items())}; {found['date']}; batch 1, "
        f"{found['heads']} heads of {found['dim']} channels, {found['dtype']}, causal. "
        f"{right} of {len(found['checks'])} checks are right.\n",
        "| op | form | work | tokens | one, ms | all, ms | gain | bytes received |",
        "| --- |" + " --- |" * 7,
    ]
    for row in found["rows"]:
        one, every = row["milliseconds"]["one"], row["milliseconds"]["all"]
        cells = [row["op"].replace("_", " "), row["impl"], row["work"], f"{row['length'] // 1024}k"]
        cells += [number(one), number(every), f"{row['gain']:.2f}", f"{row['bytes']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    if found["left_out"]:
        lines += ["", f"Left out, no time: {'; '.join(found['left_out'])}."]
    return "\n".join(lines) + "\n"
