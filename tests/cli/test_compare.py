"""`regard compare` from the outside: exit codes, one-line errors, files, Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from regard.cli import app


def run(folder: Path, *arguments: str) -> Result:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, ["compare", *arguments])
    finally:
        os.chdir(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, rows: list[str]) -> None:
        (tmp_path / name).write_text("date,temp\n" + "\n".join(rows), encoding="utf-8")

    wave = [f"{math.sin(i / 3) + 0.1 * math.sin(i * i):.4f}" for i in range(200)]
    write("good.csv", [f"d{i},{x}" for i, x in enumerate(wave)])
    write("some.csv", [f"d{i},{x if i % 10 else ''}" for i, x in enumerate(wave)])
    write("gaps.csv", [f"d{i},{x if i % 3 else ''}" for i, x in enumerate(wave)])
    write("short.csv", [f"d{i},{x}" for i, x in enumerate(wave[:30])])
    write("constant.csv", [f"d{i},5" for i in range(200)])
    write("words.csv", [f"d{i},warm" for i in range(200)])
    loads = [f"{i},{x if i != 7 else 'oops'}" for i, x in enumerate(wave)]
    (tmp_path / "loads.csv").write_text("t,load\n" + "\n".join(loads), encoding="utf-8")
    write("late.csv", [f"d{i},{x if i < 190 else ''}" for i, x in enumerate(wave)])
    (tmp_path / "semicolons.csv").write_text("date;temp\nd;1,5\n", encoding="utf-8")
    return tmp_path


QUICK = ("--lags", "6", "--horizon", "1,3", "--no-cost")


def test_any_csv(folder: Path) -> None:
    done = run(folder, "some.csv", *QUICK, "--json", "out.json", "--out", "out.html")
    assert done.exit_code == 0, done.output
    assert "local_linear" in done.stdout
    assert "20 gaps: 12 interpolated" in done.stdout
    assert "Report: out.html" in done.stdout
    data = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert data["complete"] is True
    assert data["series"]["column"] == "temp"
    assert data["method"]["horizons"] == [1, 3]
    scored = {score["scored"] for entry in data["forecasters"] for score in entry["scores"]}
    assert scored == {36}, "of 40 test rows four were never measured"
    assert (folder / "out.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_months_that_are_missing_are_said(folder: Path) -> None:
    months = [f"{year}-{month:02d}" for year in range(2000, 2017) for month in range(1, 13)]
    del months[50:53]
    wave = [f"{math.sin(i / 3) + 0.1 * math.sin(i * i):.4f}" for i in range(201)]
    rows = "\n".join(f"{month},{x}" for month, x in zip(months, wave, strict=True))
    (folder / "months.csv").write_text("month,temp\n" + rows, encoding="utf-8")
    arguments = (*QUICK, "--mechanisms", "linear", "--json", "out.json", "--out", "out.html")
    done = run(folder, "months.csv", *arguments)
    assert done.exit_code == 0, done.output
    words = "3 months are missing between the rows (the first after 2004-02)"
    assert words in " ".join(done.stdout.split())
    assert words in (folder / "out.html").read_text(encoding="utf-8")
    found = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert found["series"]["uneven"] == words


def test_decay_is_one_more_parameter(folder: Path) -> None:
    arguments = (*QUICK, "--mechanisms", "softmax,linear", "--json", "out.json")
    for decay in (False, True):
        done = run(folder, "good.csv", *arguments, *(["--decay"] if decay else []))
        assert done.exit_code == 0, done.output
        found = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        assert found["method"]["decay"] is decay
        settings = [e["settings"] for e in found["forecasters"] if e["kind"] == "mechanism"]
        assert all(("half_life" in chosen) == decay for chosen in settings)
        assert ("half_life" in done.stdout) == decay


def test_chosen_mechanisms_only(folder: Path) -> None:
    done = run(folder, "good.csv", *QUICK, "--mechanisms", "softmax, linear", "--json", "out.json")
    assert done.exit_code == 0, done.output
    entries = json.loads((folder / "out.json").read_text(encoding="utf-8"))["forecasters"]
    assert [e["name"] for e in entries if e["kind"] == "mechanism"] == ["softmax", "linear"]
    assert (folder / "regard-compare.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.csv"], "no such file: missing.csv"),
        (["c02"], "did you mean 'co2'"),
        (["semicolons.csv"], "semicolons"),
        (["words.csv"], "no numeric column"),
        (["good.csv", "--column", "date"], "not numeric: row 1 holds 'd0' (numeric columns: temp)"),
        (["good.csv", "--column", "tmep"], "did you mean 'temp'"),
        (["short.csv"], "at least 162 are needed"),
        (["constant.csv"], "constant"),
        (["gaps.csv"], "at most a fifth"),
        (["loads.csv"], "column 'load' of loads.csv is not numeric: row 8 holds 'oops'"),
        (["late.csv"], "has 30 values in the 40 rows of the last fifth"),
        (["good.csv", "--season", "5000"], "season must be from 1 to 94"),
        (["--mechanisms", "local_liner"], "did you mean 'local_linear'"),
        (["--mechanisms", ","], "names separated by commas"),
        (["--horizon", "1,x"], "whole numbers"),
        (["--horizon", "0"], "at least 1, got 0"),
        (["--lags", "0"], "lags must be"),
        (["--out", "nowhere/report.html"], "no such folder: nowhere"),
        (["--json", "."], "is a folder"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: list[str], words: str) -> None:
    before = sorted(os.listdir(folder))
    done = run(folder, *arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert done.stderr.startswith("regard compare: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(os.listdir(folder)) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupt_leaves_partial_json(folder: Path) -> None:
    command = [sys.executable, "-m", "regard", "compare", "co2", "--json", "out.json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell that starts the suite in the background lets it inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = folder / "out.json"
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert stdout == ""
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["complete"] is False
    assert data["series"]["name"] == "co2"
    assert not (folder / "regard-compare.html").exists()
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
