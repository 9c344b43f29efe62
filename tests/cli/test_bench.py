"""`regard bench` from the outside: tables, exit codes, one-line errors, files, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from regard.cli import app

TINY = ("--lengths", "16,24", "--heads", "1", "--dim", "8", "--patience", "0.05")


def run(folder: Path, *arguments: str) -> Result:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, ["bench", *arguments])
    finally:
        os.chdir(before)


def test_tables_and_files(tmp_path: Path) -> None:
    done = run(
        tmp_path, *TINY, "--mechanisms", "linear", "--noncausal",
        "--dtype", "bfloat16", "--json", "out.json", "--out", "out.html",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Non-causal self-attention, forward, in bfloat16: batch 1, 1 head of 8" in done.stdout
    assert "Length 24 (< is the fastest mechanism)" in done.stdout
    assert "At length 16 linear is the fastest" in done.stdout
    assert "Report: out.html\nNumbers: out.json" in done.stdout
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["complete"] is True
    assert {row["name"] for row in data["rows"]} == {"torch SDPA", "linear"}
    assert all(0 < row["error"] < 1.2e-2 for row in data["rows"])
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mechanisms", "local_liner"], "did you mean 'local_linear'"),
        (["--mechanisms", ","], "names separated by commas"),
        (["--lengths", "1,x"], "whole numbers"),
        (["--lengths", "0"], "at least 1, got 0"),
        (["--dtype", "float23"], "did you mean 'float32'"),
        (["--device", "cuda:99"], "torch sees no such GPU"),
        (["--device", "tpu"], "device must be"),
        (["--threads", "0"], "threads must be"),
        (["--out", "nowhere/report.html"], "no such folder: nowhere"),
        (["--json", "."], "is a folder"),
        (["--json", "one", "--out", "./one"], "one is given for two files"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert done.stderr.startswith("regard bench: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupt_leaves_partial_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "regard", "bench", *TINY, "--json", "out.json"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell that starts the suite in the background lets it inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = tmp_path / "out.json"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:  # until a row is there: files are replaced whole
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).get("rows"):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; what was found so far is in out.json" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert stdout == ""
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["complete"] is False
    assert data["rows"]
    assert not (tmp_path / "regard-bench.html").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
