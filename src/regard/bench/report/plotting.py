"""How every picture looks: drawn by matplotlib (imported here only) and inlined as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH = 5.6
COLUMNS = 3
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "regard",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ea",
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
# What appears in many pictures has the same colour in all.
COLOURS = {
    "local_linear": "#0b6fa4",
    "softmax": "#d1495b",
    "ridge autoregression": "#2e8b57",
    "last value": "#8d99a6",
    "seasonal naive": "#b8860b",
    "linear": "#7b5ea7",
    "torch SDPA": "#4d565f",
}
OTHERS = ("#c2571a", "#3c9d9b", "#a3527f", "#5b7f2b", "#6b4f3a")


@dataclass(frozen=True)
class Picture:
    """An image as a data URL, with what it shows in words."""

    name: str
    source: str
    alt: str
    caption: str


def colour(name: str, names: Sequence[str]) -> str:
    """The colour of one of the `names` of a picture."""
    if name in COLOURS:
        return COLOURS[name]
    others = [other for other in names if other not in COLOURS]
    return OTHERS[others.index(name) % len(OTHERS)]


@contextmanager
def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """A figure of the house's width and its axes [rows, columns]."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(WIDTH, height))
        yield drawing, drawing.subplots(rows, columns, squeeze=False, **options)


def source_of(drawing: Any) -> str:
    """The figure as a data URL."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None}, dpi=110)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
