"""The toy mechanism, used as a third party would: installed, then found everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = ROOT / "docs/toy_mechanism"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The toy installed into a folder of its own, without a network."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in TOY.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def python(installed: Path, *arguments: str) -> str:
    """What a fresh interpreter prints that has the toy on its path."""
    path = os.pathsep.join([str(installed), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *arguments],
        env=environment, cwd=installed, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_small() -> None:
    files = [file for file in TOY.iterdir() if file.is_file()]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 60


def test_it_passes_the_contract(installed, seed) -> None:
    program = (
        "import regard, regard.testing, torch\n"
        "torch.set_num_threads(1)\n"
        "card = regard.mechanisms['cosine']\n"
        f"print(regard.testing.check(card, seed={seed}).raise_if_failed())\n"
    )
    assert "cosine on cpu, fast tier" in python(installed, "-c", program)


def test_it_appears_in_the_registry_the_tables_and_explain(installed) -> None:
    program = (
        "import regard, torch\n"
        "from regard.testing import tables\n"
        "print(list(regard.mechanisms))\n"
        "print(tables.table())\n"
        "q = torch.randn(1, 2, 4, 8)\n"
        "print(regard.explain(regard.mechanisms['cosine'].op, q, q, q))\n"
    )
    output = python(installed, "-c", program)
    assert "'cosine'" in output
    assert "| `cosine` | [Query-Key Normalization for Transformers]" in output
    assert "cosine_attention: runs dense (impl='eager')" in output


def test_it_appears_in_the_command_line(installed) -> None:
    listed = json.loads(python(installed, "-m", "regard", "list", "--json"))
    assert "cosine" in json.dumps(listed)


def test_it_is_compared(installed) -> None:
    program = (
        "import math, regard\n"
        "wave = [math.sin(0.3 * t) + 0.3 * math.sin(0.7 * t) for t in range(160)]\n"
        "result = regard.compare(wave, lags=6, horizons=(1,), mechanisms=['cosine'], "
        "cost_lengths=())\n"
        "print(result.rmse('cosine', 1) < result.rmse('last value', 1))\n"
    )
    assert python(installed, "-c", program).strip() == "True"
