"""The pictures of a benchmark: time, memory and error against length."""

from __future__ import annotations

import math

from regard.bench.report.plotting import COLOURS, COLUMNS, Picture, colour, figure, source_of
from regard.bench.timing.result import SpeedResult

MARKERS = "osD^v"  # colours return when there are many mechanisms


def draw(result: SpeedResult) -> Picture | None:
    """Time and memory against length, one line per mechanism; None before the first row."""
    names = [name for name in result.names if any(row.name == name for row in result.rows)]
    if not names:
        return None
    lines = math.ceil(len(names) / COLUMNS)
    with figure(3.4 + 0.2 * lines, 1, 2) as (drawing, axes):
        for name in names:
            rows = sorted((r for r in result.rows if r.name == name), key=lambda row: row.length)
            lengths = [row.length for row in rows]
            style = {
                "color": colour(name, names),
                "marker": MARKERS[names.index(name) // len(COLOURS) % len(MARKERS)],
                "markersize": 4,
                "label": name,
                "linestyle": "--" if name in result.yardsticks else "-",
            }
            axes[0, 0].plot(lengths, [1000 * row.seconds for row in rows], **style)
            held = [math.nan if not row.peak_bytes else row.peak_bytes / 2**20 for row in rows]
            axes[0, 1].plot(lengths, held, **style)
        for plot, title in zip(axes[0], ("time, ms", "peak memory, MiB"), strict=True):
            plot.set_title(title, fontsize=10)
            plot.set_xlabel("length")
            plot.set_xscale("log", base=2)
            plot.set_xticks(result.lengths, [str(length) for length in result.lengths])
            plot.set_yscale("log")
            plot.minorticks_off()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper center", ncols=COLUMNS, fontsize=9)
        source = source_of(drawing)
    longest = max(row.length for row in result.rows)
    words = "; ".join(f"{row.name} {1000 * row.seconds:.3g} ms" for row in result.at(longest))
    caption = "Time of one call, and what it adds to memory, against length. Dashed: torch."
    return Picture("speed", source, f"Time against length; at {longest}: {words}.", caption)
