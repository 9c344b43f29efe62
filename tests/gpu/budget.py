"""What every kernel in the tables may need, per target: a committed file and how it is made.

    PYTHONPATH=tests python -m gpu.budget        writes the file anew, for the Triton that is here

A subject (`subjects/*.py`) is a name and a function without arguments that calls a launcher with
CPU tensors; the kernels that it would start are compiled ahead for each target.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from regard.gpu import ahead

FILE = Path(__file__).with_name("budget.json")
# What another release of the compiler may add; a local-memory access in a hot loop never.
SLACK = {"registers": 8, "shared": 2048, "stack": 64, "hot": 0}


def subjects() -> dict[str, Callable[[], Any]]:
    """All subjects by name, of every file in `subjects/`."""
    found: dict[str, Callable[[], Any]] = {}
    for file in sorted(Path(__file__).with_name("subjects").glob("[a-z]*.py")):
        found |= importlib.import_module(f"gpu.subjects.{file.stem}").SUBJECTS
    return found


def entries(name: str) -> dict[str, ahead.Launch]:
    """The distinct kernels of a subject, by the key under which the file has them."""
    found = {}
    for launch in ahead.launches(subjects()[name]):
        found.setdefault(f"{name}: {launch.name.strip('_')}", launch)
    return found


Needs = dict[str, int] | None  # None: the compiler fails


def measure(task: tuple[str, str]) -> dict[str, Needs]:
    """What the kernels of one subject need on one target."""
    name, target = task
    found: dict[str, Needs] = {}
    for key, launch in entries(name).items():
        try:
            found[f"{key} {target}"] = ahead.compile_for(launch, target)._asdict()
        except RuntimeError as error:  # of its passes: ours are CompilationError
            if "PassManager" not in str(error):
                raise
            found[f"{key} {target}"] = None
    return found


def measure_all(tasks: list[tuple[str, str]], processes: int = 2) -> dict[str, Needs]:
    """The same for many, in parallel."""
    found: dict[str, Needs] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for part in pool.map(measure, tasks):
            found |= part
    return found


def main() -> None:
    tasks = [(name, target) for name in subjects() for target in ahead.TARGETS]
    lines = [f"{json.dumps(key)}: {json.dumps(report)}" for key, report in
             sorted(measure_all(tasks).items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
