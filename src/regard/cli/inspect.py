"""`regard inspect`: where the attention of a model goes on an input of your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.options import Json, Report
from regard.cli.output import echo, print_heading, print_table
from regard.cli.running import Running, Save, Step

if TYPE_CHECKING:
    from regard.bench.inspecting.inspection import Inspecting
    from regard.bench.inspecting.result import Inspection


def inspect(
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR",
            help="A folder of transformers: config.json, weights, tokenizer or preprocessor.",
        ),
    ],
    given: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A text or a file of one, a picture or a folder of them, or a WAV recording.",
        ),
    ],
    what: Annotated[
        str | None,
        typer.Option(
            help="Of 'sinks', 'heads', 'maps' and 'saliency', separated by commas (default: all; "
            "of a folder 'heads')."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Numbers of layers, separated by commas (default: all).")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Numbers of heads, separated by commas (default: all).")
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(help="Of a folder, at most so many, evenly from all (default: 24)."),
    ] = None,
    runs: Annotated[
        int, typer.Option(help="With parts of the input hidden, for the saliency.")
    ] = 128,
    seed: Annotated[int, typer.Option(help="Of what is hidden.")] = 0,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    out: Report = Path("regard-inspect.html"),
    json: Json = None,
) -> None:
    """Look into the attention of a model of transformers on an input of your own.

    Nothing is downloaded, and no code from the folder is run.
    """
    run = Running("inspect")
    run.check_files(out, json)
    chosen = None if what is None else run.names("--what", what)
    only = None if layers is None else run.integers("--layers", layers)
    some = None if heads is None else run.integers("--heads", heads)

    def make(step: Step, save: Save) -> Inspecting:
        try:
            from regard.bench.inspecting.inspection import Inspecting

            return Inspecting(
                model_dir,
                given,
                chosen,
                pictures=pictures,
                layers=only,
                heads=some,
                runs=runs,
                seed=seed,
                device=device,
                progress=step,
            )
        except ImportError as error:
            run.fail(str(error))

    result = run.measure(make, out, json, "inspect")
    _show(result)
    typer.echo(f"\nReport: {out}" + (f"\nNumbers: {json}" if json else ""))


def _show(result: Inspection) -> None:
    echo(result.about)
    for section in result.sections:
        typer.echo()
        print_heading(section.title)
        echo(section.sentences)
        for _, (columns, rows) in section.tables:
            print_table(columns, rows)
