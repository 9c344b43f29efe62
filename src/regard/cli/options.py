"""Options that more than one command has, each with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Report = Annotated[Path, typer.Option(help="The HTML report.")]
Json = Annotated[
    Path | None,
    typer.Option(help="Also write every number as JSON; kept up to date while it runs."),
]
