"""Every kernel of the library on one GPU: is it right, how long does it take.

Run: python benchmarks/gpu.py [--minutes 8] [--out FILE]
     python benchmarks/gpu.py --only checks --only decode    (parts or sections)
     python benchmarks/gpu.py --only fuzz --fuzz 100     (benchmarks/fuzz.py: many more)
     python benchmarks/gpu.py --dry-run      (on a processor, tiny, eager, nothing is timed)
Writes results/gpu.json after every row. What the minutes do not suffice for is left out and
listed. The exit code is 1 if any result is wrong; a target of speed that is missed is reported
only.

The first call is timed cold. Then several processes compile every kernel that is timed and make the
short calls that are judged whole, at most for 40 % of the minutes; the rest is for the times. Other
GPUs of the machine help with that; one is timed, alone.
Medians of CUDA events, the cache emptied before each run, all contestants in turns in one process:
ours, torch's flash kernel and cuDNN's, FlexAttention, flash-linear-attention where it is installed.
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
from pathlib import Path

import torch

from regard.bench.kernels import case as cases
from regard.bench.kernels import gpu, others, sparse
from regard.bench.kernels.case import Case
from regard.bench.kernels.jobs import Check, jobs, take
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.result import Result, as_text, facts
from regard.bench.kernels.rows import Left, Row
from regard.bench.measure.clock import Stopwatch
from regard.core.state import write_atomically

RESULTS = Path(__file__).parent / "results"
PARTS = ("checks", "fuzz", "times")
FOR_CHECKS = 0.4  # of the time, at most, with what is compiled before
ALONE = 0.95  # of the time, where nothing is timed
ATTEMPTS = 2  # at a row, while the device is not quiet
FUZZ_ALIKE = 50  # random calls of a kind, which share what is compiled
MOST_PROCESSES = 14  # on one GPU
GRACE = 3.0  # seconds after which a process is ended
NO_TIME = "no time was left"
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
        asked = options.only or list(PARTS)
        self.parts = {part for part in PARTS if part in asked}
        self.sections = [name for name in asked if name not in PARTS]
        if self.sections:
            self.parts.add("times")

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
        programme = self.programme() if "times" in self.parts else []
        checks = self.checks() if "checks" in self.parts else []
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
            self.prepare(programme, checks)
        if "fuzz" in self.parts and self.options.fuzz:
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
        found = self.bench.row(case)
        if isinstance(found, Row) and "forward/Flex" in found.numbers:
            found.numbers |= self.result.facts.get("flex_compile", {}).get(case.mechanism, {})
        self.result.rows.append(found)
        self.keep(case.name)
        if not self.dry:
            torch.cuda.empty_cache()

    def programme(self) -> list[Case]:
        """What is timed; a dry run makes it small, and many of them are the same then."""
        programme = [
            case for case in gpu.timed() if not self.sections or case.section in self.sections
        ]
        if not self.dry:
            return programme
        return list({case.name: case for case in map(gpu.shrunk, programme)}.values())

    def checks(self) -> list[Check]:
        """Calls that are judged: whole with what is learnt, or (None) long ones at some rows."""
        checks = every_check(32 if self.dry else 1024)
        if not self.dry:
            return checks
        return [(gpu.shrunk(case), learn) for case, learn in checks[::DRY_CHECKS]]

    def prepare(self, programme: list[Case], checks: list[Check]) -> None:
        """Kernels into Triton's cache on disk, and the checks, by several processes at once."""
        devices = torch.cuda.device_count()
        count = max(1, min(MOST_PROCESSES * devices, (os.cpu_count() or 1) - 2))
        share = FOR_CHECKS if programme else ALONE
        deadline = time.time() + max(0.0, share * self.limit - self.seconds)
        found: dict[int, Row | Left] = {}
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            (work / "jobs").write_bytes(pickle.dumps(jobs(programme, checks)))
            command = [sys.executable, __file__, "--worker", folder, "--until", f"{deadline}"]
            parts = [
                subprocess.Popen([*command, "--part", f"{i}"], env=_environment(i % devices))
                for i in range(count)
            ]
            if any(case.mechanism in sparse.MECHANISMS for case in programme):
                self.result.facts["flex_compile"] = flex_compile()
            for part in parts:
                try:
                    part.wait(max(0.0, deadline + GRACE - time.time()))
                except subprocess.TimeoutExpired:
                    part.kill()  # what is missing is compiled when it is called
                    part.wait()
            spent: list[tuple[str, str, float, str]] = []
            for file in work.glob("*.pickle"):
                rows, own = pickle.loads(file.read_bytes())
                found |= rows
                spent += own
            taken = len(list(work.glob("*.taken")))
        self.result.facts["prepared"] = {
            "processes": count, "jobs": taken, "seconds": sum(job[2] for job in spent),
            "longest": sorted(spent, key=lambda job: -job[2])[:10],
        }  # fmt: skip
        for kind, name, _, fault in spent:
            if fault:
                print(f"not done beforehand: {kind} {name}: {fault}", file=sys.stderr)
        for place, (case, _) in enumerate(checks):
            self.result.checks.append(found.get(place) or Left(case, NO_TIME))
        self.keep(f"{count} processes, {taken} jobs; {len(found)} of {len(checks)} checks")

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


def _environment(device: int) -> dict[str, str]:
    """For a process that sees one GPU, and has one of the processor's cores."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in seen.split(",") if name] or [str(device)] * (device + 1)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": names[device], "OMP_NUM_THREADS": "1"}


def every_check(length: int = 1024) -> list[Check]:
    """Calls that are judged: short ones whole, long ones at some rows."""
    return [*gpu.checked(length=length), *((case, None) for case in gpu.judged())]


def judged(bench: Bench, case: Case, learn: tuple[str, ...] | None) -> Row | Left:
    """A call compared whole with what is learnt, or (None) at some rows."""
    return bench.row(case) if learn is None else bench.check(case, learn)


def work(options: argparse.Namespace) -> None:
    """What one process of many does: job after job, until there are none or the time is over.

    What it found lies in the folder after every check.
    """
    todo = pickle.loads((options.worker / "jobs").read_bytes())
    bench, found = Bench("cuda", timed=False), {}
    spent: list[tuple[str, str, float, str]] = []  # kind, first call, seconds, what broke
    for number in take(options.worker, len(todo), options.until):
        (kind, calls), begun, fault = todo[number], time.perf_counter(), ""
        for place, case, learn in calls:
            if kind == "compile":
                fault = _compiled(case)
            elif time.time() < options.until:
                found[place] = judged(bench, case, learn)
        spent.append((kind, calls[0][1].name, time.perf_counter() - begun, fault))
        write_atomically(options.worker / f"{options.part}.pickle", pickle.dumps((found, spent)))


def _compiled(case: Case) -> str:
    """Makes the calls that translate a case's kernels; what broke, "" if nothing did.

    Once more where it broke: many processes share a device, and its memory.
    """
    fault = ""
    for _ in range(2):
        try:
            _compile(case)
            fault = ""
        except Exception as error:  # it will say so when it is timed
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        cases.forget()  # what was drawn is large
        torch.cuda.empty_cache()
        if not fault:
            break
    return fault


def flex_compile() -> dict[str, dict[str, float]]:
    """Seconds in which torch compiles FlexAttention for a mask it has not seen, by mechanism.

    Of a first call, forward and with its backward; others compile meanwhile.
    """
    from torch._inductor import config

    found: dict[str, dict[str, float]] = {}
    with config.patch(force_disable_caches=True):
        for case in gpu.timed():
            flexible = case.mechanism in sparse.MECHANISMS and case.work == "gradients"
            if not flexible or case.mechanism in found:
                continue
            begun = time.perf_counter()
            try:
                calls = others.contestants(case, case.arguments("cuda"), "cuda")
                for call in calls.values():
                    call()
            except Exception as error:  # its rows will have no Flex beside them
                print(f"Flex: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            torch.cuda.synchronize()
            if calls:
                found[case.mechanism] = {"Flex compile s": time.perf_counter() - begun}
    return found


def _compile(case: Case) -> None:
    """One call, forward and where it is timed backward."""
    given = case.arguments("cuda")
    with torch.no_grad():
        case.run(given)
    if case.work == "gradients":
        leaves = {n: x.requires_grad_() if n in "qkv" else x for n, x in given.items()}
        case.run(leaves).sum().backward()
    if case.mechanism in sparse.MECHANISMS:  # torch's compiler has a cache on disk, too
        for call in others.contestants(case, given, "cuda").values():
            call()
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes, prints the table; 1 if any result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it may take")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="also N random calls")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls")
    parser.add_argument("--start", type=int, default=0, help="number of the first random call")
    sections = sorted({case.section for case in gpu.timed()})
    parser.add_argument(
        "--only", action="append", choices=[*PARTS, *sections], metavar="PART",
        help=f"may be repeated: {', '.join(PARTS)}, or what is timed: {', '.join(sections)}",
    )  # fmt: skip
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
