"""`regard info` says what the machine can do, and why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.cli import app
from regard.cli.forms import Forms, able, forms_on
from regard.native import loader

run = CliRunner()


@pytest.fixture(scope="module")
def known() -> dict:
    result = run.invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_versions_and_threads(known: dict) -> None:
    assert known["versions"]["regard"] == regard.__version__
    assert known["versions"]["torch"] == torch.__version__
    assert known["threads"]["torch"] == torch.get_num_threads()


def test_devices(known: dict) -> None:
    names = [device["name"] for device in known["devices"]]
    assert names[0] == "cpu"
    assert ("cuda:0" in names) == torch.cuda.is_available()


def test_extras_are_those_of_the_package(known: dict) -> None:
    assert {"hf", "lens", "diffusion", "timm", "plot", "sklearn", "triton"} == set(known["extras"])
    assert "dev" not in known["extras"]


def test_instruction_sets(known: dict) -> None:
    status = regard.native.status()
    assert known["native"]["usable"] == list(status.instruction_sets)
    assert known["native"]["built"] == list(status.built)


def test_every_form_of_every_mechanism_has_an_answer(known: dict) -> None:
    assert list(known["mechanisms"]) == list(regard.mechanisms)
    q = torch.zeros(1, 2, 64, 32)
    for name, card in regard.mechanisms.items():
        if card.operands or card.cases[0].options or card.cases[0].dims:
            continue
        for mask, answer in known["mechanisms"][name]["cpu"].items():
            expected = regard.explain(card.op, q, q, q, causal=mask == "causal")
            assert answer["runs"] == expected.form
            assert answer["forms"] == expected.reasons


def test_tables_show_the_chosen_form_and_the_reasons(known: dict) -> None:
    output = run.invoke(app, ["info"]).output
    assert "\x1b" not in output
    for name, on in known["mechanisms"].items():
        lines = [line for line in output.splitlines() if line.split()[:2] == [name, "cpu"]]
        for answer in on["cpu"].values():
            assert any("yes, chosen" in line for line in lines if answer["runs"] in line)
            for reason in filter(None, answer["forms"].values()):
                assert f"no: {reason}" in output


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "path", lambda: tmp_path / "none.so")
    result = run.invoke(app, ["info"])
    loader._load.cache_clear()
    assert result.exit_code == 0
    assert "none: regard was built without a C compiler" in result.output
    assert "to have it: install GCC or clang" in result.output


def test_a_call_that_no_form_serves_is_told_not_raised() -> None:
    card = regard.mechanisms["linear"]

    def refuses(q, k, v, *, causal=False):
        raise ValueError("refuses: q must be something else, got this")

    broken = regard.Card("broken", card.paper, refuses, card.reference)
    forms = forms_on(broken, "cpu")
    assert {answer.problem for answer in forms.values()} == {
        "refuses: q must be something else, got this"
    }
    assert able(forms) == []


def test_forms_able_under_either_mask() -> None:
    forms = {
        "causal": Forms("a", {"a": None, "b": "no", "c": "no"}),
        "noncausal": Forms("b", {"a": "no", "b": None, "c": "no"}),
    }
    assert able(forms) == ["a", "b"]
