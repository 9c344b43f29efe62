"""`regard compare`: which mechanism predicts a series best, and at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.options import Json, Report
from regard.cli.output import echo, print_heading, print_table
from regard.cli.running import Running, Save, Step

if TYPE_CHECKING:
    from regard.bench.compare.comparison import Comparison
    from regard.bench.compare.result import Result


def compare(
    series: Annotated[
        str,
        typer.Argument(
            metavar="[FILE.csv|co2|sunspots|seattle-temps]",
            help="A comma-separated file with a header, or a data set that ships with regard.",
        ),
    ] = "co2",
    column: Annotated[
        str | None, typer.Option(help="Column to forecast (default: the first that is measured).")
    ] = None,
    mechanisms: Annotated[
        str | None,
        typer.Option(help="Names separated by commas (default: all that need no training)."),
    ] = None,
    lags: Annotated[int, typer.Option(help="Past values that make a window.")] = 24,
    horizon: Annotated[
        str, typer.Option(help="How many rows ahead, separated by commas.")
    ] = "1,4,13,26",
    season: Annotated[
        int | None,
        typer.Option(help="Period of the seasonal baseline, in rows (default: found in the data)."),
    ] = None,
    decay: Annotated[
        bool,
        typer.Option("--decay", help="Also choose how fast old pairs are forgotten, or not."),
    ] = False,
    embedding: Annotated[
        str,
        typer.Option(help="Windows and targets 'relative' to the current value, or 'absolute'."),
    ] = "relative",
    out: Report = Path("regard-compare.html"),
    json: Json = None,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Measure time and memory as well.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the values in the cost measurement.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch; the calls are small.")] = 1,
) -> None:
    """Compare mechanisms as forecasters of your own series, without training.

    The last fifth of the series is the test; all parameters are chosen before it.
    """
    run = Running("compare")
    run.check_files(out, json)
    horizons = run.integers("--horizon", horizon)
    names = None if mechanisms is None else run.names("--mechanisms", mechanisms)

    def make(step: Step, save: Save) -> Comparison:
        from regard.bench.compare.comparison import Comparison
        from regard.bench.compare.cost import LENGTHS
        from regard.bench.compare.inputs import as_series

        comparison = Comparison(
            as_series(series, column),
            lags=lags,
            horizons=horizons,
            mechanisms=names,
            embedding=embedding,  # type: ignore[arg-type]
            season=season,
            decay=decay,
            cost_lengths=LENGTHS if cost else (),
            seed=seed,
            threads=threads,
            progress=step,
        )
        comparison.after_entry = save
        return comparison

    result = run.measure(make, out, json, "compare")
    _show(result)
    typer.echo(f"\nReport: {out}" + (f"\nNumbers: {json}" if json else ""))


def _show(result: Result) -> None:
    from regard.bench.compare import tables

    echo(tables.about(result))
    for title, (columns, rows) in tables.sections(result):
        typer.echo()
        print_heading(title)
        print_table(columns, rows)
    typer.echo()
    echo(result.findings)
    echo([f"{name} is missing: {reason}" for name, reason in result.skipped.items()])
