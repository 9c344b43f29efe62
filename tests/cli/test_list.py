"""`regard list`, and what all commands share."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.cli.output import plain_table

run = CliRunner()


def test_table_has_a_line_per_mechanism() -> None:
    result = run.invoke(app, ["list"])
    assert result.exit_code == 0, result.output
    header, *lines = result.output.splitlines()
    assert header.split("  ")[0] == "name"
    assert [line.split()[0] for line in lines] == list(regard.mechanisms)
    assert "\x1b" not in result.output, "plain where nobody looks"
    assert not any(mark in result.output for mark in "│┃…")


def test_json_says_what_the_cards_say() -> None:
    result = run.invoke(app, ["list", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert list(rows) == list(regard.mechanisms)
    for name, card in regard.mechanisms.items():
        row = rows[name]
        assert row["paper"]["title"] == card.paper.title
        assert row["patterns"] == [pattern.value for pattern in card.patterns]
        assert (row["cost"], row["state"], row["memory"]) == (card.cost, card.state, card.memory)
        assert row["summary"] == card.summary
        assert "reference" in row["forms"]
        assert set(row["tune"]) == set(card.tune)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["lst"], "lst"), (["list", "--jsn"], "--jsn"), (["list", "softmax"], "softmax")],
)
def test_wrong_usage_is_code_2(arguments: list[str], said: str) -> None:
    result = run.invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [[], ["list"], ["info"]])
def test_help_is_there(command: list[str]) -> None:
    for flag in ("-h", "--help"):
        result = run.invoke(app, [*command, flag])
        assert result.exit_code == 0
        assert "Usage:" in result.output
        assert "--json" in result.output or not command


def test_version() -> None:
    result = run.invoke(app, ["--version"])
    assert result.output == f"regard {regard.__version__}\n"


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "regard", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"regard {regard.__version__}\n"


def test_plain_table_cuts_nothing() -> None:
    long = "x" * 300
    assert plain_table(["a", "b"], [[long, "1"]]) == ["a".ljust(300) + "  b", long + "  1"]
