"""Random calls of compiled forms against float64, by many processes, within a time.

Run: python benchmarks/fuzz.py [--calls 1000] [--seconds 200] [--jobs 12] [--out FILE] [--resume]
     python benchmarks/fuzz.py --device cpu --impl eager --calls 50 --mechanisms softmax window

Calls are of a few kinds for each mechanism (dtype, head sizes, heads, operands), so that few
kernels have to be compiled; lengths, batch, masks, packed sequences, windows and all values are
free. Every worker takes one kind after the other. A wrong call is printed as it is found, with the
line that makes it again. The exit code is 1 if any call was wrong.

`--calls` is how many of local linear attention there are; the others share as many. What there is
no time for is counted, and `--resume` goes on with it from the file.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from regard.bench.report.words import aligned, number

KINDS = 28  # of local linear attention
OTHER_KINDS = 4
OTHERS = (
    "softmax", "parallax", "lightning", "gated_delta", "block_sparse", "window", "hedgehog",
    "linear", "delta", "mesa",
)  # fmt: skip
SLICE = 8  # calls between two reports


class Unit(NamedTuple):
    """The calls of one kind: `share` of `kinds`, from number `start` up to `stop`."""

    mechanism: str
    kind: int
    kinds: int
    start: int
    stop: int


def units(options: argparse.Namespace, done: dict[str, Any]) -> list[Unit]:
    """What there is to do, all mechanisms in turns."""
    names = options.mechanisms or ["local_linear", *OTHERS]
    other = max(1, options.calls // max(1, len([n for n in names if n != "local_linear"])))
    found: list[tuple[float, Unit]] = []
    for name in names:
        first = name == "local_linear"
        kinds = max(1, min(KINDS if first else OTHER_KINDS, options.calls))
        count = options.calls if first else other
        for kind in range(kinds):
            start = done.get(f"{name} {kind}", {}).get("next", 0)
            if start < count:
                found.append((kind / kinds, Unit(name, kind, kinds, start, count)))
    return [unit for _, unit in sorted(found, key=lambda pair: pair[0])]


def work(options: argparse.Namespace, deadline: float, tasks: Any, results: Any) -> None:
    """One worker: units until there are none, time is up or the device is lost."""
    import torch

    from regard.testing.fuzz import fuzz

    torch.set_num_threads(1)
    while time.time() < deadline:
        try:
            unit = tasks.get(timeout=0.2)
        except queue.Empty:
            return
        start, step = unit.start, 1  # the first call compiles
        while start < unit.stop and time.time() < deadline:
            count = min(step * unit.kinds, unit.stop - start)
            found = fuzz(
                count, mechanism=unit.mechanism, impl=options.impl, device=options.device,
                seed=options.seed, start=start, kinds=unit.kinds, share=(unit.kind, unit.kinds),
                seconds=max(0.0, deadline - time.time()),
            )  # fmt: skip
            results.put((unit, found))
            start, step = found["next"], SLICE
            if found["lost"]:  # somebody else goes on behind the call that broke it
                if start < unit.stop:
                    tasks.put(unit._replace(start=start))
                return


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All of it; the file is written after every report."""
    done: dict[str, Any] = {}
    if options.resume and options.out and options.out.exists():
        done = json.loads(options.out.read_text())["kinds"]
    deadline = time.time() + options.seconds
    context = get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    todo = units(options, done)
    for unit in todo:
        tasks.put(unit)

    def worker() -> Any:
        made = context.Process(target=work, args=(options, deadline, tasks, results), daemon=True)
        made.start()
        return made

    workers = [worker() for _ in range(min(options.jobs, len(todo)))]
    while any(one.is_alive() for one in workers) or not results.empty():
        if time.time() > deadline + GRACE:
            for one in workers:  # in the middle of a long translation
                one.terminate()
            break
        try:
            unit, found = results.get(timeout=0.5)
        except queue.Empty:
            continue
        merge(done.setdefault(f"{unit.mechanism} {unit.kind}", {}), found)
        for words in found["failures"]:
            print(f"WRONG {unit.mechanism}: {words}", flush=True)
            at = int(words.split()[1])
            print(
                f"  again: fuzz(1, mechanism={unit.mechanism!r}, impl={options.impl!r}, "
                f"device={options.device!r}, seed={options.seed}, start={at}, kinds={unit.kinds})",
                flush=True,
            )
        if found["lost"] and time.time() < deadline:
            workers.append(worker())
        if options.out:
            save(options, done)
    save(options, done)
    missing = sum(max(0, u.stop - done.get(f"{u.mechanism} {u.kind}", {}).get("next", u.start))
                  // u.kinds for u in todo)  # fmt: skip
    return {"kinds": done, "not reached": missing}


GRACE = 5.0  # seconds after the time is up


def merge(known: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds a report to what is known of a kind."""
    for name in ("calls", "gradients"):
        known[name] = known.get(name, 0) + found[name]
    known["next"] = max(known.get("next", 0), found["next"])
    known.setdefault("failures", []).extend(found["failures"])
    refused = known.setdefault("refused", {})
    for reason, count in found["refused"].items():
        refused[reason] = refused.get(reason, 0) + count
    worst = known.setdefault("worst", {})
    for dtype, share in found["worst"].items():
        worst[dtype] = max(share, worst.get(dtype, 0.0))


def save(options: argparse.Namespace, done: dict[str, Any]) -> None:
    """Writes the JSON."""
    if options.out is None:
        return
    found = {**machine(options.device), "device": options.device, "impl": options.impl}
    found |= {"seed": options.seed, "kinds": done}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


@cache
def machine(device: str) -> dict[str, Any]:
    """What the result is true of."""
    from regard.bench.kernels.result import facts

    return facts(device)


def table(done: dict[str, Any]) -> tuple[str, int, int]:
    """What was found by mechanism; calls that were compared, and wrong ones."""
    rows: dict[str, list[Any]] = {}
    for key, found in done.items():
        row = rows.setdefault(key.split()[0], [0, 0, 0, 0, {}])
        refused = sum(found["refused"].values())
        row[0] += found["calls"] - refused
        row[1] += found["gradients"]
        row[2] += refused
        row[3] += len(found["failures"])
        for dtype, share in found["worst"].items():
            row[4][dtype] = max(share, row[4].get(dtype, 0.0))
    lines = [
        [name, *map(str, row[:4]), ", ".join(f"{d} {number(s)}" for d, s in row[4].items())]
        for name, row in rows.items()
    ]
    total = [sum(row[i] for row in rows.values()) for i in range(4)]
    lines.append(["all", *map(str, total), ""])
    heads = ["mechanism", "calls", "with gradients", "refused", "wrong", "largest part of a budget"]
    return "\n".join(aligned(heads, lines)), total[0], total[3]


def main(arguments: list[str] | None = None) -> int:
    """Makes the calls, prints the table; 1 if any is wrong, or none could be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="triton", help="the form that is asked for")
    parser.add_argument("--calls", type=int, default=1000, help="of local linear attention")
    parser.add_argument("--seconds", type=float, default=200.0, help="that all of it may take")
    parser.add_argument("--jobs", type=int, default=12, help="processes")
    parser.add_argument("--mechanisms", nargs="+", metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--resume", action="store_true", help="go on with what the file has")
    options = parser.parse_args(arguments)
    found = run(options)
    text, calls, wrong = table(found["kinds"])
    print(text)
    if found["not reached"]:
        print(f"{found['not reached']} calls were not reached in {options.seconds:g} s")
    return 1 if wrong or not calls else 0


if __name__ == "__main__":
    sys.exit(main())
