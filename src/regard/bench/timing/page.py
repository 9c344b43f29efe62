"""A benchmark as one HTML page: self-contained, readable offline and on a phone."""

from __future__ import annotations

from html import escape

from regard.bench.report.page import figure, page, paragraphs, table
from regard.bench.timing import tables
from regard.bench.timing.pictures import draw
from regard.bench.timing.result import SpeedResult


def render(result: SpeedResult) -> str:
    """The page: the answer first, then the picture and the tables, then how it was done."""
    parts = [
        *paragraphs(tables.about(result)),
        "" if result.complete else "<p><strong>Interrupted: results are partial.</strong></p>",
        "<h2>What was found</h2>",
        *(f'<p class="lead">{escape(sentence)}</p>' for sentence in tables.findings(result)),
        figure(draw(result)),
    ]
    for length in result.lengths:
        if result.at(length):
            parts += [f"<h2>Length {length}</h2>", table(*tables.numbers(result, length))]
    parts += [f'<p class="note">{escape(line)}</p>' for line in tables.compared(result)]
    forms = tables.forms(result)
    if forms[1]:
        parts += ["<h2>Which form ran, and why not the others</h2>", table(*forms, words=True)]
    if result.refused:
        parts += ["<h2>Left out</h2>", *paragraphs(tables.refusals(result))]
    parts += [
        "<h2>How it was done</h2>",
        *paragraphs(_method(result)),
        f"<footer>{escape(_footer(result))}</footer>",
    ]
    return page("Which attention is fastest here", parts)


def _method(result: SpeedResult) -> list[str]:
    return [
        "Every mechanism runs in a fresh process, which times torch's own attention as well: a "
        "ratio is of two times from one process. A matrix product is timed before and after each "
        "row; where it moved by more than a tenth the row was measured again, up to three times, "
        "and called noisy if that did not help.",
        "Memory is what one call adds at most to what was held with its inputs. Mechanisms compute "
        "different things: the fastest is not the same attention for less time. All get the same "
        "q, k and v, further operands drawn from their domain, and the options of their default "
        "case.",
    ]


def _footer(result: SpeedResult) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return f"{versions}; {result.machine['system']} {result.machine['architecture']}; seed " + (
        f"{result.setting.seed}."
    )
