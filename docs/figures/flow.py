"""Draws docs/figures/flow.svg: how a call travels through the house.

Run: python docs/figures/flow.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STEPS = [
    ("regard.ops.softmax_attention(q, k, v, …)", "ops", "your call"),
    ("precision.cast_for_autocast", "core", "one dtype"),
    ("checks.check_qkv, …", "core", "metadata only, one error style"),
    ("dispatch.choose", "core", "first form that can serve, or the reason why none"),
    ("cache.KVCache.extend", "core", "old keys + new keys"),
    ("visibility.Visibility", "core", "which keys, what is added"),
]
FORMS = [
    ("reference", "the equations"),
    ("eager", "blocks in torch"),
    ("native", "compiled, CPU"),
    ("triton", "compiled, GPU"),
]
COLOURS = {"ops": "#2f6f8f", "core": "#5b6770", "form": "#8f5a2f"}
WIDTH, ROW, BOX = 760, 62, 40


def box(x: float, y: float, width: float, title: str, note: str, colour: str) -> str:
    """One box with a title and a note under it."""
    middle = x + width / 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="6" fill="{colour}"/>'
        f'<text x="{middle}" y="{y + 17}" class="title">{escape(title)}</text>'
        f'<text x="{middle}" y="{y + 32}" class="note">{escape(note)}</text>'
    )


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """A line with a head at its end."""
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" class="arrow" marker-end="url(#head)"/>'


def draw() -> str:
    """The whole picture as SVG text."""
    parts = []
    x, width = 190, 380
    for index, (title, room, note) in enumerate(STEPS):
        y = 14 + index * ROW
        parts.append(box(x, y, width, title, note, COLOURS[room]))
        if index:
            parts.append(arrow(x + width / 2, y - (ROW - BOX), x + width / 2, y - 3))
    bottom = 14 + len(STEPS) * ROW + 14
    cell = (WIDTH - 40) / len(FORMS)
    start = 14 + (len(STEPS) - 1) * ROW + BOX
    for index, (title, note) in enumerate(FORMS):
        left = 20 + index * cell
        parts.append(box(left + 8, bottom, cell - 16, title, note, COLOURS["form"]))
        parts.append(arrow(x + width / 2, start, left + cell / 2, bottom - 3))
    back = bottom + BOX / 2
    parts.append(
        f'<path d="M {WIDTH - 20} {back} h 12 V 34 H {x + width + 4}" class="arrow" '
        'marker-end="url(#head)"/>'
        f'<text x="{WIDTH - 14}" y="26" class="side">output (and state)</text>'
    )
    height = bottom + BOX + 16
    style = (
        "text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#fff}"
        ".title{font-size:14px;font-weight:600}.note{font-size:11px}"
        ".side{fill:#7a858d;font-size:12px;text-anchor:end}"
        ".arrow{stroke:#9aa5ad;stroke-width:1.6;fill:none}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="How a call flows through regard"><style>{style}</style><defs>'
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#9aa5ad"/></marker></defs>'
        + "".join(parts)
        + "</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
