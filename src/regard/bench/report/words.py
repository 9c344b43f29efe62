"""Numbers and tables as text, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Sequence

Table = tuple[list[str], list[list[str]]]


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent where it can be read.

    >>> number(0.39361), number(12.345), number(1234.5), number(None)
    ('0.394', '12.3', '1234', '-')
    """
    if value is None:
        return "-"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else f"{float(text):#.{digits}g}".rstrip(".")


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a line for each row.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]), end="")
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def size(count: int | None) -> str:
    """Bytes in MiB."""
    return "-" if count is None else f"{count / 2**20:.1f}"


def milliseconds(value: float) -> str:
    """Seconds in ms."""
    return f"{number(1000 * value)}"


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with two spaces between columns."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
