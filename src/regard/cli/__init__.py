"""The command `regard`: one module per command, registered here.

Exit codes: 0 done, 1 failed, 2 wrong usage (an unknown option, a file that cannot be read), 130
interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import regard
from regard.cli import bench, compare, info, inspect
from regard.cli.list import list_mechanisms
from regard.cli.swap_report import swap_report

app = typer.Typer(
    name="regard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() and sys.stderr.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"regard {regard.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Attention you can trust, compare and swap."""


app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("list")(list_mechanisms)
app.command("info")(info.info)
app.command("inspect")(inspect.inspect)
app.command("swap-report")(swap_report)


def main() -> None:
    """Runs the command line."""
    app()
