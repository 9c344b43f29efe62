"""Local linear attention on this processor: is it right, how long does it take.

Run: python benchmarks/cpu.py [--quick] [--only eager] [--parts threads] [--fuzz 1000] [--out FILE]
(about fifteen minutes; --quick a minute, --parts threads two at most per form). Nothing else should
run meanwhile: rows during which the machine was not quiet are marked and decide nothing. Writes
results/cpu_KIND.json, KIND being the best instruction set of torch here; the threads alone go to
results/threads_KIND.json. The exit code is 1 if any result is wrong; a target of speed that is
missed is reported only.

One thread, processor time, the least of at least five interleaved runs, beside torch's own
attention in the same process; a matrix product before and after every row tells whether the
machine was quiet. Two threads are timed by the wall.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from regard import native
from regard.bench.kernels import cpu
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.result import Result, as_text, facts
from regard.bench.kernels.rows import Left
from regard.bench.kernels.threads import scaling

RESULTS = Path(__file__).parent / "results"
IMPLS = ("eager", "native")
PARTS = ("checks", "times", "threads")


def peak(isa: str | None = None) -> float:
    """Multiply-and-add peak of one thread, GFLOP/s."""
    return native.fma_peak(seconds=0.02, isa=isa)


def measure(options: argparse.Namespace, save: Path | None) -> Result:
    """Everything; `save` is written after every row."""
    impls = [impl for impl in IMPLS if options.only in (None, impl)]
    parts = options.parts or (PARTS[:2] if options.quick else PARTS)
    sets = native.instruction_sets()
    result = Result("cpu", facts("cpu"))
    begun = time.perf_counter()
    bench = Bench(
        peak=peak if sets else None, within=native.limited_to, attempts=1 if options.quick else 3
    )

    def keep(words: str) -> None:
        result.seconds = time.perf_counter() - begun
        print(f"{result.seconds:6.0f} s  {words}", file=sys.stderr, flush=True)
        if save is not None:
            result.save(save)

    if sets:
        result.peak["before"] = native.fma_peak(0.2)
    for case, learn in cpu.checked(impls, sets, options.quick) if "checks" in parts else ():
        result.checks.append(bench.check(case, learn))
        keep(f"check {case.name}")
    if options.fuzz:
        random_calls(options, impls[-1], result, keep)
    programme = list(cpu.timed(impls, sets[0] if sets else _torch_set(), options.quick))
    if "native" in impls and not options.quick:
        programme += cpu.lower_sets(sets)
    for case in programme if "times" in parts else ():
        result.rows.append(bench.row(case))
        keep(case.name)
    for case in cpu.threaded(impls) if "threads" in parts else ():
        found = scaling(case)
        if isinstance(found, Left):
            result.rows.append(found)
            keep(f"two threads, {case.name}: {found.reason}")
        else:
            result.threads.append(found)
            keep(f"{found['name']}: {found['gain']:.2f} times as fast")
    if sets:
        result.peak["after"] = native.fma_peak(0.2)
    result.complete = True
    keep("done")
    return result


def random_calls(
    options: argparse.Namespace, impl: str, result: Result, keep: Callable[[str], None]
) -> None:
    """N of local linear on the best instruction set, a quarter elsewhere and of its relatives."""
    from regard.testing.fuzz import fuzz

    sets = native.instruction_sets() if impl == "native" else ()
    if not sets:
        impl = "eager"
    for isa in sets or (None,):
        with native.limited_to(isa) if isa else nullcontext():
            for mechanism in ("local_linear", "parallax", "softmax"):
                all_of_them = mechanism == "local_linear" and isa == next(iter(sets), None)
                count = options.fuzz if all_of_them else options.fuzz // 4
                found = fuzz(count, mechanism=mechanism, impl=impl, seed=options.seed)
                result.fuzz.append({**found, "isa": isa})
                keep(f"{count} random calls of {mechanism}" + (f" on {isa}" if isa else ""))


def _torch_set() -> str:
    return torch.backends.cpu.get_cpu_capability().lower()


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes, prints the table; 1 if any result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a subset, for a minute")
    parser.add_argument("--only", choices=IMPLS, help="one form")
    parser.add_argument("--parts", action="append", choices=PARTS, help="a part, may be repeated")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="also N random calls")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = options.out
    if path is None and options.parts == ["threads"] and options.only is None:
        path = RESULTS / f"threads_{_torch_set()}.json"
    elif path is None and not (options.quick or options.parts or options.only):
        path = RESULTS / f"cpu_{_torch_set()}.json"
    result = measure(options, path)
    print(as_text(result, ("SDPA",)))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
