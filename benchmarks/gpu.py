"""Local linear attention on one GPU: is it right, how long does it take.

Run: python benchmarks/gpu.py [--minutes 8] [--out FILE]
     python benchmarks/gpu.py --only fuzz --fuzz 100     (benchmarks/fuzz.py: many more)
     python benchmarks/gpu.py --dry-run      (on a processor, tiny, eager, nothing is timed)
Writes results/gpu.json after every row. What the minutes do not suffice for is left out and
listed. The exit code is 1 if any result is wrong; a target of speed that is missed is reported
only.

The first call is timed cold. Then several processes compile every kernel that is timed and make the
short calls that are judged whole, at most for 45 % of the minutes; the rest is for the times.
Medians of CUDA events, the cache emptied before each run, all contestants in turns in one process:
ours, torch's flash kernel and cuDNN's, flash-linear-attention where it is installed.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from regard.bench.kernels import gpu, others, sparse
from regard.bench.kernels.case import Case
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.result import Result, as_text, facts
from regard.bench.kernels.rows import Left, Row
from regard.bench.measure.clock import Stopwatch
from regard.core.state import write_atomically

RESULTS = Path(__file__).parent / "results"
PARTS = ("checks", "fuzz", "times")
FOR_CHECKS = 0.45  # of the time, at most, with what is compiled before
ALONE = 0.95  # of the time, where nothing is timed
ATTEMPTS = 2  # at a row, while the device is not quiet
FUZZ_ALIKE = 50  # random calls of a kind, which share what is compiled
MOST_PROCESSES = 14
GRACE = 3.0  # seconds after which a process is ended
NO_TIME = "no time was left"
Check = tuple[Case, tuple[str, ...] | None]
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
        self.bench = Bench(
            self.device, timed=not self.dry, attempts=ATTEMPTS, peak=None if self.dry else peak
        )
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
            programme = programme[1:]
        if self.limit <= 0:
            self.result.checks = [Left(case, NO_TIME) for case, _ in checks]
        elif self.dry:
            for case, learn in checks:
                self.result.checks.append(judged(self.judge, case, learn))
                self.keep(f"check {case.name}")
        elif programme or checks:
            self.prepare(checks, compiling=bool(programme))
        if "fuzz" in parts and self.options.fuzz:
            self.random_calls()
        for case in programme:
            if self.seconds > self.limit:
                self.result.rows.append(Left(case, NO_TIME))
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

    def checks(self) -> list[Check]:
        """Calls that are judged: whole with what is learnt, or (None) long ones at some rows.

        In a spread order: what there is no time for is left out everywhere.
        """
        checks = every_check(32 if self.dry else 1024)
        if not self.dry:
            return checks
        return [(gpu.shrunk(case), learn) for case, learn in checks[::DRY_CHECKS]]

    def prepare(self, checks: list[Check], compiling: bool) -> None:
        """Kernels into Triton's cache on disk, and the checks, by several processes at once."""
        count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
        seconds = (FOR_CHECKS if compiling else ALONE) * self.limit - self.seconds
        deadline = time.time() + max(0.0, seconds)
        found: dict[int, Row | Left] = {}
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--worker", folder, "--until", f"{deadline}"]
            command += ["--only", "times"] * compiling + ["--only", "checks"] * bool(checks)
            parts = [subprocess.Popen([*command, "--part", f"{i}/{count}"]) for i in range(count)]
            for part in parts:
                try:
                    part.wait(max(0.0, deadline + GRACE - time.time()))
                except subprocess.TimeoutExpired:
                    part.kill()  # what is missing is compiled when it is called
                    part.wait()
            for file in Path(folder).glob("*.pickle"):
                found |= pickle.loads(file.read_bytes())
        for place, (case, _) in enumerate(checks):
            self.result.checks.append(found.get(place) or Left(case, NO_TIME))
        self.keep(f"compiled by {count} processes; {len(found)} of {len(checks)} checks")

    def random_calls(self) -> None:
        """`regard.testing.fuzz`."""
        from regard.testing.fuzz import fuzz

        impl = "eager" if self.dry else "triton"
        for mechanism in ("local_linear", "parallax"):
            count = self.options.fuzz if mechanism == "local_linear" else self.options.fuzz // 4
            kinds = None if self.dry else max(1, count // FUZZ_ALIKE)
            found = fuzz(
                count, mechanism=mechanism, impl=impl, device=self.device,
                seed=self.options.seed, start=self.options.start, kinds=kinds,
            )  # fmt: skip
            self.result.fuzz.append(found)
            self.keep(f"{count} random calls of {mechanism}")


def _compiled(case: Case) -> tuple[Any, ...]:
    """What the kernels of a call may depend on: neither ridge nor keys."""
    names = ("mechanism", "work", "dim", "length", "rows", "dtype", "extra", "causal", "kv_heads")
    options = [str(item) for item in case.options.items() if item[0] not in ("tol", "tol_backward")]
    return (*(getattr(case, name) for name in names), *options)


def every_check(length: int = 1024) -> list[Check]:
    """Calls that are judged, in a spread order."""
    long = ((case, None) for case in gpu.judged())
    return spread([*gpu.checked(length=length), *long])


def judged(bench: Bench, case: Case, learn: tuple[str, ...] | None) -> Row | Left:
    """A call compared whole with what is learnt, or (None) at some rows."""
    return bench.row(case) if learn is None else bench.check(case, learn)


def work(options: argparse.Namespace) -> None:
    """What one process of many does: compiles every n-th case that is timed, then judges checks.

    What it found lies in the folder after every check.
    """
    number, count = map(int, options.part.split("/"))
    if "times" in options.only:
        for case in list({_compiled(case): case for case in gpu.timed()}.values())[number::count]:
            if time.time() < options.until:
                with suppress(Exception):  # whatever fails will say so when it is timed
                    _compile(case)
    bench, found = Bench("cuda", timed=False), {}
    checks = list(enumerate(every_check()))[number::count] if "checks" in options.only else []
    for place, (case, learn) in checks:
        if time.time() > options.until:
            return
        found[place] = judged(bench, case, learn)
        write_atomically(options.worker / f"{number}.pickle", pickle.dumps(found))


def _compile(case: Case) -> None:
    """One call, forward and where it is timed backward."""
    if case.impl != "triton":
        return
    backward = case.work == "gradients"
    with torch.set_grad_enabled(backward):
        given = case.arguments("cuda")
        if backward:
            given = {n: x.requires_grad_() if n in "qkv" else x for n, x in given.items()}
        out = case.run(given)
        if backward:
            out.sum().backward()
        if case.mechanism in sparse.MECHANISMS:  # torch's compiler has a cache on disk, too
            for call in others.contestants(case, given, "cuda").values():
                call()
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
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="tiny and eager, on a processor")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here (--dry-run tries the script without one)")
    if options.worker is not None:
        work(options)
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
