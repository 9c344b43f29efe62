"""`import regard` costs next to nothing over `import torch`, and brings no optional package."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest

from guards.sources import ROOT

CHILD = """
import json, pathlib, resource, sys, time
import torch

def megabytes():
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

modules, memory, start = set(sys.modules), megabytes(), time.process_time()
import regard
took = time.process_time() - start
new = sorted({name.split(".")[0] for name in set(sys.modules) - modules})
print(json.dumps({"seconds": took, "megabytes": megabytes() - memory, "new": new}))
"""
# Of the base installation, too, what only the command line or a picture needs.
HEAVY = {"matplotlib", "typer", "rich", "click", "pandas", "scipy", "safetensors"}
NAMES = {"scikit-learn": "sklearn", "scikit-image": "skimage"}


@pytest.fixture(scope="module")
def costs() -> list[dict]:
    command = [sys.executable, "-c", CHILD]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return [json.loads(run.stdout) for run in runs]


def test_seconds(costs: list[dict]) -> None:
    assert min(cost["seconds"] for cost in costs) <= 0.2


def test_megabytes(costs: list[dict]) -> None:
    assert min(cost["megabytes"] for cost in costs) <= 30


def test_no_optional_package(costs: list[dict]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"].values()
    packages = {line.split(">")[0].split("[")[0] for group in groups for line in group}
    extras = {NAMES.get(name, name).replace("-", "_") for name in packages - {"regard"}}
    assert {"transformers", "sklearn", "triton", "pytest"} <= extras
    assert not (extras | HEAVY) & set(costs[0]["new"])
