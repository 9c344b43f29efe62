"""`regard bench`: which attention is the fastest on this machine at a length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.options import Json, Report
from regard.cli.output import echo, print_heading, print_table
from regard.cli.running import Running, Save, Step

if TYPE_CHECKING:
    from regard.bench.timing.benchmark import Benchmark
    from regard.bench.timing.result import SpeedResult


def bench(
    mechanisms: Annotated[
        str | None, typer.Option(help="Names separated by commas (default: all).")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Sequence lengths, separated by commas.")
    ] = "512,2048,8192",
    heads: Annotated[int, typer.Option(help="Heads of queries and of keys.")] = 4,
    dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="'float64', 'float32', 'bfloat16' or 'float16'.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    causal: Annotated[bool, typer.Option("--causal/--noncausal", help="The mask.")] = True,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time a forward and a backward pass together.")
    ] = False,
    threads: Annotated[
        int, typer.Option(help="Threads of torch; with more than one, wall time is taken.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of all values.")] = 0,
    patience: Annotated[
        float,
        typer.Option(
            help="Seconds for a row, after which it gets fewer than five runs; a call of an "
            "estimated 15 times as long is left out."
        ),
    ] = 4.0,
    out: Report = Path("regard-bench.html"),
    json: Json = None,
) -> None:
    """Find the fastest attention on this machine at your length: time, memory, exactness.

    Every mechanism is timed in a fresh process beside torch's own attention.
    """
    run = Running("bench")
    run.check_files(out, json)
    numbers = run.integers("--lengths", lengths)
    names = None if mechanisms is None else run.names("--mechanisms", mechanisms)

    def make(step: Step, save: Save) -> Benchmark:
        from regard.bench.timing.benchmark import Benchmark
        from regard.bench.timing.setting import Setting

        setting = Setting(
            lengths=tuple(sorted(set(numbers))),
            heads=heads,
            dim=dim,
            batch=batch,
            dtype=dtype,
            device=device,
            causal=causal,
            backward=backward,
            threads=threads,
            seed=seed,
            patience=patience,
        )
        benchmark = Benchmark(setting, names, step)
        benchmark.after_row = save
        return benchmark

    result = run.measure(make, out, json, "speed")
    _show(result)
    typer.echo(f"\nReport: {out}" + (f"\nNumbers: {json}" if json else ""))


def _show(result: SpeedResult) -> None:
    from regard.bench.timing import tables

    echo(tables.about(result))
    for title, (columns, rows) in tables.sections(result):
        typer.echo()
        print_heading(title)
        print_table(columns, rows)
    typer.echo()
    echo(result.findings)
    echo(tables.compared(result))
    echo([f"Left out: {words}" for words in tables.refusals(result)])
