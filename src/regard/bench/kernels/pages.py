"""The results of a kernel benchmark as Markdown tables and pictures, from its JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regard.bench.kernels.result import fuzzed
from regard.bench.report.plotting import OTHERS, figure, source_of
from regard.bench.report.words import number

Json = Mapping[str, Any]
COLOURS = {
    "SDPA": "#4d565f",
    "flash": "#4d565f",
    "cuDNN": "#8d99a6",
    "eager": "#b8860b",
    "native": "#0b6fa4",
    "triton": "#0b6fa4",
}
TITLES = {
    "forward": "Forward",
    "gradients": "Forward and backward",
    "decode": "Decoding: one query per head",
    "relatives": "Softmax and Parallax by the same engine",
    "other keys": "Other keys",
    "lengths": "Lengths",
    "not causal": "Not causal",
    "other dtypes": "Other dtypes",
    "other heads": "Grouped queries",
    "instruction sets": "Lower instruction sets",
    "precision": "Precision",
    "tolerance": "Tolerance",
    "variants": "Other patterns and operands, per visible pair",
    "memory": "Memory",
    "eager": "The eager form",
    "linear family": "The linear family",
    "linear family, gradients": "The linear family, forward and backward",
    "linear family, memory": "The linear family, memory of a forward and backward",
    "linear family, decode": "The linear family, one token",
    "chosen blocks": "Block-sparse attention",
    "chosen blocks, gradients": "Block-sparse attention, forward and backward",
    "chosen blocks, lower sets": "Block-sparse attention, lower instruction sets",
    "windows": "Windows",
    "policies": "Block-sparse attention with the choice of blocks",
}

# Numbers that are shown where some row has a target for them.
EXTRA = (
    "backward/forward", "forward/base", "pair/base", "memory/inputs", "memory of both/q",
    "SDPA/forward", "SDPA/both",
    "flash/forward", "transformers/forward", "forward/fla", "forward/read", "us", "us with grad",
    "published/forward", "forward/Flex", "first call",
)  # fmt: skip
# Numbers that are shown wherever a row has them.
ALWAYS = ("both/Flex", "Flex compile s", "plan ms", "with plan ms", "with plan/flash")


def yardsticks(result: Json) -> tuple[str, ...]:
    """Torch's kernels that were timed beside ours."""
    return ("flash", "cuDNN") if result["device"].startswith("cuda") else ("SDPA",)


def about(result: Json) -> str:
    """Where, with what and when; how much of it was right; which targets were missed."""
    where, versions = result["machine"], result["versions"]
    name = where.get("gpu") or where.get("processor") or where["architecture"]
    peaks = [value for value in result["fma_peak_gflops"].values() if value]
    lines = [
        f"{name}; " + ", ".join(f"{n} {v}" for n, v in versions.items()) + f"; {result['date']}."
    ]
    if peaks:
        what = (
            "a plain bfloat16 product" if "gpu" in where else "one thread that multiplies and adds"
        )
        words = " and ".join(f"{number(peak)}" for peak in peaks)
        lines.append(f"Peak of {what}, before and after: {words} GFLOP/s.")
    right = sum(row["right"] for row in result["checks"])
    lines.append(f"{right} of {len(result['checks'])} short calls are right, gradients included.")
    lines += [f"{fuzzed(found)}." for found in result["fuzz"]]
    wrong = result["wrong"]
    lines.append(f"Wrong results: {len(wrong)}." if wrong else "No result is wrong.")
    return " ".join(lines) + "\n"


def missed(result: Json) -> str:
    """The targets that were not met, as a list; how many were."""
    rows = [*result["checks"], *result["rows"], *result["threaded"]]
    targets = [(row, t) for row in rows for t in row["targets"] if t["level"] == "must"]
    met = sum(t["met"] for _, t in targets)
    stretched = [t["met"] for row in rows for t in row["targets"] if t["level"] == "stretch"]
    words = f"; of the stretched ones {sum(stretched)} of {len(stretched)}" if stretched else ""
    lines = [f"{met} of {len(targets)} targets are met{words}.\n"]
    for row, target in targets:
        if not target["met"]:
            noisy = ", while the machine was not quiet" if row.get("noisy") else ""
            lines.append(
                f"- {row['name']}: {target['quantity']} {number(target['value'])}, "
                f"wanted {_bound(target)}{noisy}"
            )
    return "\n".join(lines) + "\n"


def table(result: Json, section: str) -> str:
    """The rows of one section."""
    rows = [row for row in result["rows"] if row["section"] == section]
    if not rows:
        left = sorted({r["reason"] for r in result["left_out"] if r["section"] == section})
        return "Not measured" + (f": {'; '.join(left)}" if left else "") + ".\n"
    sticks = yardsticks(result)
    work = (
        "both" if section.endswith(("gradients", "memory")) and section != "memory" else "forward"
    )
    heads = ["call", "ms", *(f"/ {name}" for name in sticks)]
    waited = any(row.get("milliseconds_of_a_call") for row in rows)
    forms = section.startswith("linear family")
    heads[1:1] = ["form"] * forms
    heads += ["of a call, ms"] * waited
    extra = [name for name in EXTRA if any(_wanted(row, name) for row in rows)]
    extra += [name for name in ALWAYS if any(name in row["numbers"] for row in rows)]
    shares = any("of peak" in row["numbers"] for row in rows)
    steps = any(row["iterations"] for row in rows)
    heads += [*extra, "error", *["iterations"] * steps, *["of peak"] * shares]
    heads.append("measured, asked")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        numbers = row["numbers"]
        cells = [row["name"], *[row["form"]] * forms, number(row["milliseconds"].get(work))]
        cells += [_times(numbers.get(f"{work}/{name}")) for name in sticks]
        cells += [number(row.get("milliseconds_of_a_call", {}).get(work))] * waited
        cells += [_number(name, numbers.get(name)) for name in extra]
        cells.append(f"{max(v['error'] or 0.0 for v in row['verdicts']):.0e}")
        if steps:
            cells.append("-" if not row["iterations"] else f"{row['iterations'][0]:.1f}")
        if shares:
            share = numbers.get("of peak")
            cells.append("-" if share is None else f"{100 * share:.0f} %")
        words = [_asked(target) for target in row["targets"]]
        if row["keys"] == "sharp" and row["residual"] is not None:
            words.append(f"residual at most {row['residual']:.0e}")
        if row["noisy"]:
            words.append("the machine was not quiet")
        lines.append("| " + " | ".join([*cells, "; ".join(words)]) + " |")
    return "\n".join(lines) + "\n"


def _asked(target: Json) -> str:
    """A target in words: what, what came out, what was asked, whether it is met."""
    words = f"{target['quantity']} {number(target['value'])}, {_bound(target)}"
    if target["level"] == "stretch":
        return f"{words} (stretch): {'met' if target['met'] else 'not met'}"
    return f"{words}: {'met' if target['met'] else '**missed**'}"


def _title(section: str) -> str:
    return TITLES.get(section, section)


def left_out(result: Json) -> str:
    """What was not measured: how many rows of which section, and why; "" if nothing."""
    found: dict[tuple[str, str], int] = {}
    for row in result["left_out"]:
        if row["section"] != "threads":  # named with the table of those
            key = (_title(row["section"]), row["reason"])
            found[key] = found.get(key, 0) + 1
    if not found:
        return ""
    lines = [f"- {name}: {count}; {why}" for (name, why), count in found.items()]
    return "### Not measured\n\n" + "\n".join(lines) + "\n"


def threads(result: Json) -> str:
    """What a second thread gained."""
    heads = ["call", "one, ms", "two, ms", "gain", "median gain", "rounds", "target"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in result["threaded"]:
        one, two = row["milliseconds"]["one"], row["milliseconds"]["two"]
        asked = [f"{'' if t['met'] else '**missed:** '}{_bound(t)}" for t in row["targets"]]
        gains = [f"{row['gain']:.2f}", f"{row['median_gain']:.2f}"]
        cells = [row["name"], number(one), number(two), *gains, str(row["rounds"])]
        lines.append("| " + " | ".join([*cells, "; ".join(asked)]) + " |")
    left = [row for row in result["left_out"] if row["section"] == "threads"]
    lines += [f"\nNot measured: {row['name']}, {row['reason']}." for row in left]
    return "\n".join(lines) + "\n" if result["threaded"] or left else "Not measured.\n"


def sections(result: Json) -> str:
    """Every section that has rows, with its title."""
    names = dict.fromkeys(row["section"] for row in result["rows"])
    parts = [f"### {_title(name)}\n\n{table(result, name)}" for name in names]
    if result["threaded"] or any(row["section"] == "threads" for row in result["left_out"]):
        parts.append(f"### Two threads\n\n{threads(result)}")
    parts += [text for text in [left_out(result)] if text]
    return "\n".join(parts)


def _wanted(row: Json, quantity: str) -> bool:
    return any(t["quantity"] == quantity for t in row["targets"])


def _number(name: str, value: float | None) -> str:
    """A ratio, or a time in the unit that its name says."""
    return _times(value) if "/" in name else "-" if value is None else number(value)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{number(value)}x"


def _bound(target: Json) -> str:
    if target["most"] is not None:
        return f"≤ {target['most']:g}"
    return f"≥ {target['least']:g}"


# -- pictures ----------------------------------------------------------------------------------


def pictures(result: Json) -> dict[str, bytes]:
    """SVG by name: "lengths", "peak", "tolerance"; only those that there are rows for."""
    found = {}
    for name, draw in (("lengths", _lengths), ("peak", _peak), ("tolerance", _tolerance)):
        source = draw(result)
        if source is not None:
            found[name] = base64.b64decode(source.split(",", 1)[1])
    return found


CAPTIONS = {
    "lengths": "Time of one forward, and what it adds to memory, against length: D = 64, ridge 1.",
    "peak": "Share of the peak that a forward reaches, by its own count of work.",
    "tolerance": "Error against time: one point per tolerance, D = 64.",
}


def _plain(rows: Iterable[Json], **wanted: Any) -> list[Json]:
    """Causal rows of local linear attention with these values, one per length."""
    fixed = {"mechanism": "local_linear", "keys": "normal", "causal": True, **wanted}
    kept = [
        row
        for row in rows
        if all(row[name] == value for name, value in fixed.items())
        and row["section"] in ("forward", "lengths", "memory", "eager")
        and row["work"] == "forward"
        and not row["options"]
        and row["milliseconds"]
    ]
    return sorted({row["length"]: row for row in kept}.values(), key=lambda row: row["length"])


def _lengths(result: Json) -> str | None:
    series: dict[str, list[Json]] = {}
    for impl in dict.fromkeys(row["impl"] for row in result["rows"]):
        rows = _plain(result["rows"], dim=64, ridge=1.0, impl=impl)
        if len(rows) > 1:
            series[impl] = rows
    if not series:
        return None
    with figure(3.2, 1, 2) as (drawing, axes):
        time, memory = axes[0]
        for impl, rows in series.items():
            at, style = [row["length"] for row in rows], {"marker": "o", "markersize": 3}
            times = [row["milliseconds"]["forward"] for row in rows]
            time.plot(at, times, label=impl, color=COLOURS[impl], **style)
            held = [(row["peak_bytes"] or 0) / 2**20 or float("nan") for row in rows]
            memory.plot(at, held, color=COLOURS[impl], **style)
        for name in yardsticks(result):
            rows = [r for rows in series.values() for r in rows]
            known = {r["length"]: r["milliseconds"].get(f"{name} forward") for r in rows}
            known = {at: value for at, value in sorted(known.items()) if value}
            style = {"linestyle": "--", "color": COLOURS[name]}
            time.plot(list(known), list(known.values()), label=f"torch {name}", **style)
        lengths = sorted({row["length"] for rows in series.values() for row in rows})
        for plot, title in ((time, "time, ms"), (memory, "memory added, MiB")):
            _logarithmic(plot, title, lengths)
        drawing.legend(*time.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return source_of(drawing)


def _peak(result: Json) -> str | None:
    rows = [
        row
        for row in result["rows"]
        if "of peak" in row["numbers"]
        and row["section"] in ("forward", "relatives", "instruction sets")
        and row["keys"] == "normal"
        and row["ridge"] == 1.0
    ]
    if not rows:
        return None
    kinds: dict[str, dict[int, float]] = {}
    for row in rows:
        words = [row["mechanism"].replace("_", " "), row["impl"]]
        kind = ", ".join([*words, row["isa"]] if row["isa"] else words)
        share = kinds.setdefault(kind, {})
        share[row["dim"]] = max(100 * row["numbers"]["of peak"], share.get(row["dim"], 0.0))
    dims = sorted({row["dim"] for row in rows})
    with figure(3.2) as (drawing, axes):
        plot = axes[0, 0]
        for position, (kind, share) in enumerate(kinds.items()):
            colour = OTHERS[position % len(OTHERS)] if position else COLOURS["native"]
            at = [dims.index(D) for D in share]
            marker = "osD^vP"[position % 6]
            plot.plot(at, list(share.values()), marker=marker, label=kind, color=colour)
        plot.set_xticks(range(len(dims)), [str(D) for D in dims])
        plot.set_xlabel("D")
        plot.set_ylim(0, 100)
        plot.set_title("share of the peak, %", fontsize=10)
        drawing.legend(loc="outside upper center", ncols=2, fontsize=8)
        return source_of(drawing)


def _tolerance(result: Json) -> str | None:
    rows = [r for r in result["rows"] if r["section"] == "tolerance" and r["milliseconds"]]
    if not rows:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        precision = row["options"].get("precision", "auto")
        name = f"{row['impl']}, ridge {row['ridge']:g}"
        name += f", {precision}" if precision != "auto" else ""
        point = (row["milliseconds"]["forward"], row["verdicts"][0]["error"])
        lines.setdefault(name, []).append(point)
    with figure(3.2) as (drawing, axes):
        plot = axes[0, 0]
        for position, (name, points) in enumerate(lines.items()):
            style = {"marker": "osD^v"[position % 5], "markersize": 4}
            colour = OTHERS[position % len(OTHERS)]
            plot.plot(*zip(*sorted(points), strict=True), label=name, color=colour, **style)
        plot.set_xlabel("time, ms")
        plot.set_title("error against float64", fontsize=10)
        plot.set_xscale("log")
        plot.set_yscale("log")
        drawing.legend(loc="outside upper center", ncols=2, fontsize=8)
        return source_of(drawing)


def _logarithmic(plot: Any, title: str, lengths: Sequence[int]) -> None:
    plot.set_title(title, fontsize=10)
    plot.set_xlabel("length")
    plot.set_xscale("log", base=2)
    if any(value > 0 for line in plot.get_lines() for value in line.get_ydata()):
        plot.set_yscale("log")
    shown = lengths if len(lengths) < 6 else lengths[::2]
    plot.set_xticks(shown, [str(n) if n < 1024 else f"{n // 1024}k" for n in shown])
    plot.minorticks_off()
