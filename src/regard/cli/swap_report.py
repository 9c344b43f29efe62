"""`regard swap-report`: which mechanism each attention layer of a model on disk can take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.output import print_heading, print_json, print_table
from regard.cli.running import Running

if TYPE_CHECKING:
    from regard.adapt.reporting import Report

LAYERS = ("layers", "pattern", "heads", "head size", "window", "more")
MECHANISMS = ("mechanism", "layers", "can be put in")


def swap_report(
    model_dir: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", help="A folder of transformers with a config.json."),
    ],
    mechanisms: Annotated[
        str | None,
        typer.Option(help="Names of `regard list`, separated by commas (default: all)."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Numbers, paths or patterns as '*.self_attn', separated by commas (default: all)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which mechanism each attention layer of a model can take, or why not.

    Weights are not needed and not read; nothing is downloaded, and no code from the folder is run.
    """
    run = Running("swap-report")
    names = None if mechanisms is None else run.names("--mechanisms", mechanisms)
    chosen = None if layers is None else [_layer(x) for x in run.names("--layers", layers)]
    try:
        import transformers

        from regard.adapt.transformers import report
        from regard.adapt.transformers.skeleton import skeleton
        from regard.bench.inspecting.opening import quiet

        with quiet(transformers):
            model = skeleton(model_dir)
        found = report(model).only(names, chosen)
    except ImportError as error:
        run.fail(str(error))
    except (TypeError, ValueError) as error:
        said = str(error).removeprefix("skeleton: ").removeprefix("report: ")
        run.fail(f"MODEL_DIR{said.removeprefix('folder')}" if said.startswith("folder") else said)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _layer(name: str) -> int | str:
    return int(name) if name.removeprefix("-").isdecimal() else name


def _show(found: Report) -> None:
    count = len(found.layers)
    print_heading(f"{found.model}: {count} attention layer{'s' * (count != 1)}")
    print_table(LAYERS, found.layer_rows())
    typer.echo()
    print_heading("Mechanisms")
    rows = [(name, layers, answer) for layers, name, answer in found.rows()]
    print_table(MECHANISMS, sorted(rows, key=lambda row: row[2] != "yes"))
