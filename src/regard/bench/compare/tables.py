"""The tables of a comparison as rows of text, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Sequence

from regard.bench.compare.cost import SDPA
from regard.bench.compare.regressor import TAIL
from regard.bench.compare.result import Result
from regard.bench.report.words import Table, aligned, milliseconds, number, size


def settings(chosen: dict[str, object], edges: Sequence[str] = ()) -> str:
    """`scale 16, ridge 0.03`: an asterisk marks a value at the end of its grid."""
    words = (
        f"{name} {value:.3g}{'*' * (name in edges)}"
        if isinstance(value, int | float) and not isinstance(value, bool)
        else f"{name} {'none' if value is None else value}{'*' * (name in edges)}"
        for name, value in chosen.items()
    )
    return ", ".join(words)


def errors(result: Result, *, relative: bool) -> Table:
    """Error by horizon, in units of the series or over that of the last value."""
    columns = ["forecaster", *(f"h = {h}" for h in result.horizons)]
    rows = []
    for entry in result.entries:
        cells = []
        for horizon in result.horizons:
            score = entry.score(horizon)
            value = None if score is None else score.relative if relative else score.rmse
            best = result.best(horizon)
            least = score and best and score.rmse == result.rmse(best, horizon)
            mark = " <" if least and value is not None else ""
            cells.append(number(value) + mark)
        rows.append([entry.name, *cells])
    return columns, rows


def choices(result: Result) -> Table:
    """What was chosen on the validation stretch, and how exact the computation was."""
    columns = ["forecaster", "chosen", "tried", "validation", "ran"]
    columns += [f"error vs float64, last {TAIL} rows"]
    rows = [
        [
            entry.name,
            settings(entry.settings, entry.edges) or "-",
            str(entry.tried) if entry.tried else "-",
            number(entry.validation),
            entry.form or "-",
            "-" if entry.deviation is None else f"{entry.deviation:.0e}",
        ]
        for entry in result.entries
        if entry.kind == "mechanism" or entry.settings
    ]
    return columns, rows


def costs(result: Result) -> Table:
    """Milliseconds (and their ratio to torch SDPA) and MiB at each length."""
    if not result.costs:
        return ["mechanism"], []
    lengths = result.costs[0].lengths
    columns = ["mechanism"]
    columns += [f"ms at {n}" for n in lengths] + [f"MiB at {n}" for n in lengths]
    rows = []
    for cost in result.costs:
        times = [
            milliseconds(t) + ("" if cost.name == SDPA else f" ({number(r, 2)}x)")
            for t, r in zip(cost.seconds, cost.ratios, strict=True)
        ]
        rows.append([cost.name, *times, *map(size, cost.peak_bytes)])
    return columns, rows


def about(result: Result) -> list[str]:
    """The data and how they were cut, in a few sentences."""
    series, method = result.series, result.method
    gaps, cut = series["gaps"], method["split"]
    unit = f" ({series['unit']})" if series["unit"] else ""
    lines = [
        f"Column {series['column']!r}{unit} of {series['name']}: {series['rows']} rows, "
        f"{cut['training']} for training, {cut['validation']} to choose parameters, "
        f"the last {cut['test']} as the test, of which {series['scored']} are measured and scored."
    ]
    if sum(gaps.values()):
        lines.append(
            f"{sum(gaps.values())} gaps: {gaps['training']} interpolated in the training stretch, "
            f"{gaps['validation'] + gaps['test']} after it filled with the last seen value; no "
            "filled value is a target."
        )
    if series["uneven"]:
        lines.append(
            f"Rows are taken as equally spaced, but {series['uneven']}. A row with an empty value "
            "in its place would be a gap."
        )
    return lines


def sections(result: Result) -> list[tuple[str, Table]]:
    """The tables that have rows, with their titles."""
    unit = f", {result.series['unit']}" if result.series["unit"] else ""
    points = result.series["scored"]
    parts = [
        (
            f"Root mean squared error by horizon{unit} ({points} points; < is best)",
            errors(result, relative=False),
        ),
        ("Error over that of the last value", errors(result, relative=True)),
        ("Chosen before the test (* outermost value tried)", choices(result)),
        ("Cost of one causal call (and its time over torch SDPA's)", costs(result)),
    ]
    return [(title, table) for title, table in parts if table[1]]


def as_text(result: Result) -> str:
    """The result as plain lines: what `print(result)` shows."""
    lines = about(result)
    for title, (columns, rows) in sections(result):
        lines += ["", title, *aligned(columns, rows)]
    if result.findings:
        lines += ["", *result.findings]
    lines += [f"{name} is missing: {reason}" for name, reason in result.skipped.items()]
    return "\n".join(lines)
