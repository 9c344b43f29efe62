"""Local linear attention on one GPU: is it right, how long does it take.

Run: python benchmarks/gpu.py [--minutes 8] [--out FILE]
     python benchmarks/gpu.py --only fuzz --fuzz 1000
     python benchmarks/gpu.py --dry-run      (on a processor, tiny, eager, nothing is timed)
Writes results/gpu.json after every row. What the minutes do not suffice for is left out and
listed. The exit code is 1 if any result is wrong; a target of speed that is missed is reported
only.

Kernels are compiled first, by several processes at once, after the first call was timed cold.
Medians of CUDA events, the cache emptied before each run, all contestants in turns in one process:
ours, torch's flash kernel and cuDNN's, flash-linear-attention where it is installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from regard.bench.kernels import gpu
from regard.bench.kernels.case import Case
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.result import Result, as_text, facts
from regard.bench.kernels.rows import Left, Row
from regard.bench.measure.clock import Stopwatch

RESULTS = Path(__file__).parent / "results"
PARTS = ("checks", "fuzz", "times")
FOR_CHECKS = 0.5  # of the time, at most
FUZZ_ALIKE = 50  # random calls that share what is compiled
MOST_PROCESSES = 14
COMPILING = 150.0  # seconds, at most
DRY_CHECKS = 11  # one of so many in a dry run


def peak(isa: str | None = None) -> float:
    """GFLOP/s of a plain product of bfloat16 matrices."""
    matrix = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    watch = Stopwatch("cuda")
    times = [watch.once(lambda: matrix @ matrix)[0] for _ in range(6)]
    return 2e-9 * 8192**3 / statistics.median(times[1:])


class Run:
    """One run, with the clock that it has to keep."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dry, self.options = options.dry_run, options
        self.device = "cpu" if self.dry else "cuda"
        self.begun = time.perf_counter()
        self.limit = 60 * options.minutes
        self.bench = Bench(self.device, timed=not self.dry, peak=None if self.dry else peak)
        self.judge = Bench(self.device, timed=False)
        self.result = Result(self.device, facts(self.device))
        self.path = options.out or (None if self.dry else RESULTS / "gpu.json")

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.begun

    def keep(self, words: str) -> None:
        """Writes what there is."""
        self.result.seconds = self.seconds
        print(f"{self.seconds:6.1f} s  {words}", file=sys.stderr, flush=True)
        if self.path is not None:
            self.result.save(self.path)

    def everything(self) -> Result:
        """Checks, random calls, times: those that were asked for."""
        parts = self.options.only or PARTS
        programme = self.programme() if "times" in parts else []
        checks = self.checks() if "checks" in parts else []
        if not self.dry:
            self.result.peak["before"] = peak()
            for case in programme[:1]:  # its first call compiles: nothing is in a cache yet
                self.row(case)
            if programme or checks:
                self.compile()
            programme = programme[1:]
        until = (FOR_CHECKS if programme else 1.0) * self.limit
        for case, learn in checks:
            if self.seconds > until:
                self.result.checks.append(Left(case, "no time was left"))
                continue
            found = self.judge.row(case) if learn is None else self.judge.check(case, learn)
            self.result.checks.append(found)
            self.keep(f"check {case.name}")
        if "fuzz" in parts and self.options.fuzz:
            self.random_calls()
        for case in programme:
            if self.seconds > self.limit:
                self.result.rows.append(Left(case, "no time was left"))
                continue
            self.row(case)
        if not self.dry:
            self.result.peak["after"] = peak()
        self.result.complete = True
        self.keep("done")
        return self.result

    def row(self, case: Case) -> None:
        """One that is timed."""
        self.result.rows.append(self.bench.row(case))
        self.keep(case.name)
        if not self.dry:
            torch.cuda.empty_cache()

    def programme(self) -> list[Case]:
        """What is timed; a dry run makes it small, and many of them are the same then."""
        cases = list(gpu.timed())
        if not self.dry:
            return cases
        return list({case.name: case for case in map(gpu.shrunk, cases)}.values())

    def checks(self) -> list[tuple[Case, tuple[str, ...] | None]]:
        """Calls that are judged: whole with what is learnt, or (None) long ones at some rows.

        In a spread order: what there is no time for is left out everywhere.
        """
        every = [*gpu.checked(length=32 if self.dry else 1024)]
        checks = spread([*every, *((case, None) for case in gpu.judged())])
        if not self.dry:
            return checks
        return [(gpu.shrunk(case), learn) for case, learn in checks[::DRY_CHECKS]]

    def compile(self) -> None:
        """Every kernel into Triton's cache on disk, by several processes at once."""
        count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
        command = [sys.executable, __file__, "--compile-only"]
        parts = [subprocess.Popen([*command, f"{i}/{count}"]) for i in range(count)]
        deadline = time.perf_counter() + COMPILING
        for part in parts:
            try:
                part.wait(max(0.0, deadline - time.perf_counter()))
            except subprocess.TimeoutExpired:
                part.kill()  # what is missing is compiled when it is called
                part.wait()
        self.keep(f"compiled by {count} processes")

    def random_calls(self) -> None:
        """`regard.testing.fuzz`."""
        from regard.testing.fuzz import fuzz

        impl = "eager" if self.dry else "triton"
        alike = 1 if self.dry else FUZZ_ALIKE
        for mechanism in ("local_linear", "parallax"):
            count = self.options.fuzz if mechanism == "local_linear" else self.options.fuzz // 4
            found = fuzz(
                count, mechanism=mechanism, impl=impl, device=self.device,
                seed=self.options.seed, start=self.options.start, alike=alike,
            )  # fmt: skip
            self.result.fuzz.append(found)
            self.keep(f"{count} random calls of {mechanism}")


def _compiled(case: Case) -> tuple[Any, ...]:
    """What the kernels of a call may depend on: neither ridge nor keys."""
    names = ("mechanism", "work", "dim", "length", "rows", "dtype", "extra", "causal", "kv_heads")
    kind = case.section == "check"
    return (kind, *(getattr(case, name) for name in names), *map(str, case.options.items()))


def compile_part(part: str) -> None:
    """Calls every n-th case once, forward and backward; whatever fails will say so when timed."""
    number, count = map(int, part.split("/"))
    cases = [*gpu.timed(), *(case for case, _ in gpu.checked()), *gpu.judged()]
    for case in list({_compiled(case): case for case in cases}.values())[number::count]:
        if case.impl != "triton":
            continue
        backward = case.work == "gradients" or case.section == "check"
        with suppress(Exception), torch.set_grad_enabled(backward):
            given = case.arguments("cuda")
            if backward:
                given = {n: x.requires_grad_() if n in "qkv" else x for n, x in given.items()}
            out = case.run(given)
            if backward:
                out.sum().backward()
            torch.cuda.synchronize()


def spread(items: Iterable) -> list:
    """The items in an order in which any beginning is a sample of all.

    >>> spread(range(5))
    [0, 2, 4, 1, 3]
    """
    items = list(items)
    return items[::2] + items[1::2]


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes, prints the table; 1 if any result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it may take")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="also N random calls")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls")
    parser.add_argument("--start", type=int, default=0, help="number of the first random call")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part, may be repeated")
    parser.add_argument("--compile-only", metavar="PART", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="tiny and eager, on a processor")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here (--dry-run tries the script without one)")
    if options.compile_only is not None:
        compile_part(options.compile_only)
        return 0
    result = Run(options).everything()
    print(as_text(result, ("flash", "cuDNN")))
    found = [row for row in (*result.rows, *result.checks) if isinstance(row, Row)]
    nothing = options.minutes > 0 and not found and not result.fuzz
    if nothing:
        print("WRONG: nothing could be called")
    return 1 if result.wrong or nothing else 0


if __name__ == "__main__":
    raise SystemExit(main())
