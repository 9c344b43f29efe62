"""How commands print: rich tables on a terminal, plain aligned lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer


def on_terminal() -> bool:
    """Whether somebody looks at standard output, rather than a file or another program."""
    return sys.stdout.isatty()


def print_json(value: Any) -> None:
    """`value` as indented JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def echo(lines: Sequence[str]) -> None:
    """Sentences, wrapped between words where somebody looks."""
    if not on_terminal():
        for line in lines:
            typer.echo(line)
        return
    from rich.console import Console

    for line in lines:
        Console(highlight=False, markup=False).print(line)


def print_heading(text: str) -> None:
    """A line above a table or a paragraph."""
    if on_terminal():
        from rich.console import Console

        Console(highlight=False).print(f"[bold]{text}[/bold]")
    else:
        typer.echo(text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose cells wrap on a terminal; elsewhere nothing is coloured, wrapped or cut."""
    if on_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console(highlight=False).print(table)
        return
    for line in plain_table(columns, rows):
        typer.echo(line)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines of text, two spaces between columns.

    >>> plain_table(["name", "year"], [["softmax", "2017"]])
    ['name     year', 'softmax  2017']
    """
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
