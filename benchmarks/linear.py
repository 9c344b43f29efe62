"""The linear family on this processor, on every instruction set: right, and how fast.

Run: python benchmarks/linear.py [--isa avx2] [--only hedgehog] [--out FILE]
(about ten minutes; with `--isa` and `--only` a minute or two). Nothing else should run meanwhile:
rows during which the machine was not quiet are marked. Without `--isa` and `--only` it writes
results/linear_cpu.json. The exit code is 1 if any result is wrong; a target that is missed is
reported only.

One thread, processor time, the least of at least seven interleaved runs, as times of torch's own
attention over ours in the same process: whichever set our kernels are held to, torch's uses its
best. "of peak" is the share of the vector operations that a mechanism cannot do without in what
the processor does of them, a register loop before and after every row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from regard import native
from regard.bench.kernels import family
from regard.bench.kernels.case import Case
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.result import Result, as_text, facts

RESULTS = Path(__file__).parent / "results"


def programme(sets: tuple[str, ...], only: str | None) -> Iterator[Case]:
    """Every row, on one instruction set after the other; the last, without targets, is no aim."""
    for isa in sets:
        for case in family.on_processor(Case, "auto", isa in native.instruction_sets()[:2], False):
            if only in (None, case.mechanism):
                against = None if case.against is None else replace(case.against, isa=isa)
                yield replace(case, isa=isa, against=against)


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes, prints the table; 1 if any result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--isa", choices=native.instruction_sets(), help="one instruction set")
    parser.add_argument("--only", choices=sorted({name for name, _ in family.FASTER} | {"linear"}))
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sets = native.instruction_sets()[:2] if options.isa is None else (options.isa,)
    if not sets:
        parser.error("there is no native library here")
    path = options.out
    if path is None and options.isa is None and options.only is None:
        path = RESULTS / "linear_cpu.json"
    result = Result("cpu", facts("cpu"))
    bench = Bench(
        peak=lambda isa: native.fma_peak(0.02, isa), within=native.limited_to, rounds=7, attempts=2
    )
    for case in programme(sets, options.only):
        result.rows.append(bench.row(case))
        print(case.isa, case.name, file=sys.stderr, flush=True)
        if path is not None:
            result.save(path)
    result.complete = True
    if path is not None:
        result.save(path)
    print(as_text(result, ("SDPA",)))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
