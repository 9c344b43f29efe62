"""`regard compare`: which mechanism predicts a series best, and at what cost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from regard.cli.output import on_terminal, print_heading, print_table

if TYPE_CHECKING:
    from regard.bench.compare.result import Result

WRONG, INTERRUPTED = 2, 130
Step = Callable[[str, float, float], None]


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
    embedding: Annotated[
        str,
        typer.Option(help="Windows and targets 'relative' to the current value, or 'absolute'."),
    ] = "relative",
    out: Annotated[Path, typer.Option(help="The HTML report.")] = Path("regard-compare.html"),
    json: Annotated[
        Path | None,
        typer.Option(help="Also write every number as JSON; kept up to date while it runs."),
    ] = None,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Measure time and memory as well.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the values in the cost measurement.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch; the calls are small.")] = 1,
) -> None:
    """Compare mechanisms as forecasters of your own series, without training.

    The last fifth of the series is the test; all parameters are chosen before it.
    """
    for path in (out, json):
        if path is not None and not path.parent.is_dir():
            _fail(f"no such folder: {path.parent}")
        if path is not None and path.is_dir():
            _fail(f"{path} is a folder, not a file")
    horizons = _integers("--horizon", horizon)
    names = None if mechanisms is None else _names("--mechanisms", mechanisms)
    with _interruptible():
        from regard.bench.compare.comparison import Comparison
        from regard.bench.compare.cost import LENGTHS
        from regard.bench.compare.inputs import as_series

        comparison: Comparison | None = None
        try:
            with _progress() as step:
                try:
                    comparison = Comparison(
                        as_series(series, column),
                        lags=lags,
                        horizons=horizons,
                        mechanisms=names,
                        embedding=embedding,  # type: ignore[arg-type]
                        season=season,
                        cost_lengths=LENGTHS if cost else (),
                        seed=seed,
                        threads=threads,
                        progress=step,
                    )
                    _save(comparison.result, json)
                except (KeyError, TypeError, ValueError, OSError) as error:
                    _fail(_words(error))
                comparison.after_entry = lambda result: _save(result, json)
                result = comparison.run()
        except KeyboardInterrupt:
            _save(comparison.result if comparison else None, json)
            kept = f"; what was found so far is in {json}" if json else ""
            typer.echo(f"regard compare: interrupted{kept}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        try:
            _save(result, json)
            result.save_report(out)
        except OSError as error:
            _fail(_words(error))
    _show(result)
    typer.echo(f"\nReport: {out}" + (f"\nNumbers: {json}" if json else ""))


def _fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    typer.echo(f"regard compare: {' '.join(message.split())}", err=True)
    raise typer.Exit(WRONG)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot write {error.filename}: {error.strerror}"
    return str(error).removeprefix("compare: ")


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        _fail(f"{option} must be whole numbers separated by commas, got {text!r}")


def _names(option: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        _fail(f"{option} must be names separated by commas, got {text!r}")
    return names


def _save(result: Result | None, path: Path | None) -> None:
    """Writes the JSON file, if one is wanted; before anything was found, one that says so."""
    if path is None:
        return
    if result is not None:
        result.save_json(path)
        return
    from regard.core.state import write_atomically

    write_atomically(path, b'{"complete": false}\n')


@contextmanager
def _interruptible() -> Iterator[None]:
    """A termination request is treated like Ctrl-C: what was found is kept."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress() -> Iterator[Step]:
    """A bar on a terminal; elsewhere a line on standard error whenever the step changes."""
    if not sys.stderr.isatty():
        last = ""

        def tell(words: str, done: float, total: float) -> None:
            nonlocal last
            if words != last:
                last = words
                typer.echo(f"[{100 * done / max(total, 1):3.0f} %] {words}", err=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda words, done, total: bar.update(
            task, description=words, completed=done, total=total
        )


def _show(result: Result) -> None:
    from regard.bench.compare import tables

    _echo(tables.about(result))
    for title, (columns, rows) in tables.sections(result):
        typer.echo()
        print_heading(title)
        print_table(columns, rows)
    typer.echo()
    _echo(result.findings)
    _echo([f"{name} is missing: {reason}" for name, reason in result.skipped.items()])


def _echo(lines: list[str]) -> None:
    """Sentences, wrapped between words where somebody looks."""
    if not on_terminal():
        for line in lines:
            typer.echo(line)
        return
    from rich.console import Console

    for line in lines:
        Console(highlight=False, markup=False).print(line)
