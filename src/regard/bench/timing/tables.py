"""The tables of a benchmark as rows of text, for the terminal and the page alike."""

from __future__ import annotations

from regard.bench.report.words import Table, aligned, milliseconds, number, size
from regard.bench.timing.result import Row, SpeedResult


def about(result: SpeedResult) -> list[str]:
    """What was called, on what, and how it was timed."""
    setting, machine = result.setting, result.machine
    where = machine.get("gpu") or machine["processor"] or machine["architecture"]
    threads = f"{setting.threads} thread{'s' * (setting.threads != 1)}"
    heads = f"{setting.heads} head{'s' * (setting.heads != 1)}"
    work = "forward and backward" if setting.backward else "forward"
    lines = [
        f"{'Causal' if setting.causal else 'Non-causal'} self-attention, {work}, in "
        f"{setting.dtype}: batch {setting.batch}, {heads} of {setting.dim} channels, "
        "normal q, k, v.",
        f"{where}, {threads}; {result.clock} of at least five runs unless said otherwise.",
    ]
    if result.peak:
        values = " and ".join(f"{value:.0f} ({when})" for when, value in result.peak.items())
        lines.append(f"Peak of one thread that only multiplies and adds, GFLOP/s: {values}.")
    return lines


def numbers(result: SpeedResult, length: int) -> Table:
    """Every row of one length, the fastest first."""
    gradients = result.setting.backward
    columns = ["attention", "ms", *(_over(name) for name in result.yardsticks), "MiB", "error"]
    columns += ["error of gradients"] * gradients + ["ran", "note"]
    fastest = result.fastest(length)
    rows = []
    for row in result.at(length):
        ratios = [
            "-" if (ratio := row.ratios.get(name)) is None else f"{number(ratio, 2)}x"
            for name in result.yardsticks
        ]
        mark = " <" if row is fastest else ""
        cells = [row.name, milliseconds(row.seconds) + mark, *ratios, size(row.peak_bytes)]
        cells.append(error(row.error))
        cells += [error(row.gradient_error)] * gradients
        rows.append([*cells, row.form or "-", note(row)])
    return columns, rows


def _over(yardstick: str) -> str:
    return "/ " + yardstick


def error(value: float | None) -> str:
    """One digit of a relative error; "inf" where a value is not finite."""
    return "-" if value is None else f"{value:.0e}"


def note(row: Row) -> str:
    """What to know about a row before trusting it."""
    words = []
    if row.noisy:
        words.append(f"noisy: the sentinel moved {100 * row.sentinel_moved:.0f} %")
    if row.runs < 5:
        words.append(f"{row.runs} run{'s' * (row.runs != 1)}")
    if row.error is None:
        words.append(row.compared)
    return "; ".join(words)


def forms(result: SpeedResult) -> Table:
    """For every mechanism which form ran, at which lengths, and why not the others."""
    rows = []
    for name in result.names:
        answers: dict[tuple[str, str], list[int]] = {}
        for row in result.rows:
            if row.name == name and row.form is not None:
                others = "; ".join(
                    f"{form}: {reason or 'could serve, is not preferred'}"
                    for form, reason in row.reasons.items()
                    if form != row.form and not (form == "reference" and reason is None)
                )
                answers.setdefault((row.form, others), []).append(row.length)
        for (form, others), lengths in answers.items():
            rows.append([name, ", ".join(map(str, lengths)), form, others or "-"])
    return ["attention", "length", "ran", "the others"], rows


def refusals(result: SpeedResult) -> list[str]:
    """What there is no number for; one reason at several lengths is one line."""
    grouped: dict[tuple[str, str], list[int]] = {}
    for refusal in result.refused:
        grouped.setdefault((refusal.name, refusal.reason), []).append(refusal.length)
    return [
        f"{name} at {', '.join(map(str, lengths))}: {reason}"
        for (name, reason), lengths in grouped.items()
    ]


def compared(result: SpeedResult) -> list[str]:
    """Over what the errors were taken, one line per kind of answer."""
    grouped: dict[str, list[int]] = {}
    for row in result.rows:
        if row.error is not None and row.length not in grouped.setdefault(row.compared, []):
            grouped[row.compared].append(row.length)
    words = "; ".join(
        f"at {', '.join(map(str, lengths))}: {text}" for text, lengths in grouped.items()
    )
    return [f"Errors are relative, against the float64 reference: {words}."] if words else []


def findings(result: SpeedResult) -> list[str]:
    """Who is the fastest at each length."""
    stick = result.yardsticks[0]
    said = []
    for length in result.lengths:
        rows = [row for row in result.at(length) if row.name not in result.yardsticks]
        if not rows:
            continue
        first = rows[0]
        ratio = first.ratios.get(stick)
        over = "" if ratio is None else f", {number(ratio, 2)} times {stick}"
        words = f"At length {length} {first.name} is the fastest: {milliseconds(first.seconds)} ms"
        words += over
        if len(rows) > 1:
            factor = rows[1].seconds / first.seconds if first.seconds else float("inf")
            words += f"; then {rows[1].name}, {number(factor, 3)} times as long"
        said.append(words + ".")
    noisy = sum(row.noisy for row in result.rows)
    if noisy:
        said.append(
            f"The machine was not quiet during {noisy} of {len(result.rows)} rows; run it again "
            "when nothing else does."
        )
    return said


def sections(result: SpeedResult) -> list[tuple[str, Table]]:
    """The tables that have rows, with their titles."""
    parts = [
        (f"Length {length} (< is the fastest mechanism)", numbers(result, length))
        for length in result.lengths
    ]
    parts.append(("Which form ran, and why not the others", forms(result)))
    return [(title, table) for title, table in parts if table[1]]


def as_text(result: SpeedResult) -> str:
    """The result as plain lines: what `print(result)` shows."""
    lines = about(result)
    for title, (columns, rows) in sections(result):
        lines += ["", title, *aligned(columns, rows)]
    lines += ["", *findings(result), *compared(result)]
    lines += [f"Left out: {words}" for words in refusals(result)]
    return "\n".join(lines)
