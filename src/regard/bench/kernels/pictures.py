"""The results of a kernel benchmark as pictures, from its JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from regard.bench.kernels.pages import Json, yardsticks
from regard.bench.report.plotting import OTHERS, figure, source_of

COLOURS = {
    "SDPA": "#4d565f",
    "flash": "#4d565f",
    "cuDNN": "#8d99a6",
    "eager": "#b8860b",
    "native": "#0b6fa4",
    "triton": "#0b6fa4",
}

CAPTIONS = {
    "lengths": "Time of one forward, and what it adds to memory, against length: D = 64, ridge 1.",
    "peak": "Share of the peak that a forward reaches, by its own count of work.",
    "tolerance": "Error against time: one point per tolerance, D = 64.",
    "linear": "The linear family: time of one forward against length, D = 64 and 128.",
    "density": "Attention to chosen blocks: time over that of torch's flash kernel, and what is "
    "asked at blocks of 128. Solid: forward; dotted: forward and backward.",
}


def pictures(result: Json) -> dict[str, bytes]:
    """SVG by name, those of `CAPTIONS`; only those that there are rows for."""
    drawn = {
        "lengths": _lengths, "peak": _peak, "tolerance": _tolerance, "linear": _linear,
        "density": _density,
    }  # fmt: skip
    found = {}
    for name, draw in drawn.items():
        source = draw(result)
        if source is not None:
            found[name] = base64.b64decode(source.split(",", 1)[1])
    return found


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


def _linear(result: Json) -> str | None:
    """Of a GPU, where lengths reach far enough to be lines."""
    rows = [
        row
        for row in result["rows"]
        if row["section"] == "linear family" and row["length"] >= 4096 and row["milliseconds"]
    ]
    if "flash" not in yardsticks(result) or not rows:
        return None
    dims = sorted({row["dim"] for row in rows})
    sticks = yardsticks(result)
    lines: dict[str, dict[tuple[int, int], float]] = {f"torch {name}": {} for name in sticks}
    for row in rows:
        words = [row["mechanism"].replace("_", " ")]
        words += [name.replace("_", " ") for name in row["extra"]]
        words += ["30 iterations"] * ("max_iters" in row["options"])
        at, times = (row["dim"], row["length"]), row["milliseconds"]
        lines.setdefault(", ".join(words), {})[at] = times["forward"]
        for name in sticks:
            if f"{name} forward" in times:
                lines[f"torch {name}"][at] = times[f"{name} forward"]
    with figure(3.4, 1, len(dims)) as (drawing, axes):
        for plot, dim in zip(axes[0], dims, strict=True):
            for position, (name, times) in enumerate(lines.items()):
                known = COLOURS.get(name.removeprefix("torch "))
                colour = known or OTHERS[position % len(OTHERS)]
                style = {"linestyle": "--" if known else "-", "marker": "osD^vP"[position % 6]}
                own = sorted((length, time) for (D, length), time in times.items() if dim == D)
                if own:
                    points = zip(*own, strict=True)
                    plot.plot(*points, label=name, color=colour, markersize=4, **style)
            lengths = sorted({row["length"] for row in rows})
            _logarithmic(plot, f"time, ms, D = {dim}", lengths)
        handles = {}
        for plot in axes[0]:
            handles |= dict(zip(*reversed(plot.get_legend_handles_labels()), strict=True))
        drawing.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=4, fontsize=8
        )
        return source_of(drawing)


def _density(result: Json) -> str | None:
    rows = [
        row
        for row in result["rows"]
        if row["section"] == "chosen blocks" and not row["causal"]
        and "both/flash" in row["numbers"]
    ]  # fmt: skip
    if not rows:
        return None
    dims = sorted({row["dim"] for row in rows})
    with figure(3.4, 1, len(dims)) as (drawing, axes):
        for plot, dim in zip(axes[0], dims, strict=True):
            lines: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
            for row in (row for row in rows if row["dim"] == dim):
                key = row["options"]["block_q"], row["length"]
                numbers = row["numbers"]
                point = (row["density"], numbers["forward/flash"], numbers["both/flash"])
                lines.setdefault(key, []).append(point)
            for position, ((block, length), points) in enumerate(sorted(lines.items())):
                at, forward, both = zip(*sorted(points), strict=True)
                style = {"color": OTHERS[position % len(OTHERS)], "markersize": 4}
                label = f"blocks of {block}, {length // 1024}k"
                plot.plot(at, forward, marker="o", label=label, **style)
                plot.plot(at, both, marker="o", linestyle=":", **style)
            bound = [(d, 0.85 * d + 0.01) for d in (0.1, 0.3)]
            plot.plot(*zip(*bound, strict=True), "--", color=COLOURS["flash"], label="asked")
            plot.set_xlabel("density")
            plot.set_ylim(0, None)
            plot.set_title(f"time / flash, D = {dim}", fontsize=10)
        handles = axes[0, 0].get_legend_handles_labels()
        drawing.legend(*handles, loc="outside upper center", ncols=3, fontsize=8)
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
