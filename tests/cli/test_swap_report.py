"""`regard swap-report` from the outside: tables, JSON, exit codes, errors of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import regard
import tiny_models as tiny
from regard.cli import app


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["swap-report", *map(str, arguments)])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("gemma")
    model = tiny.decoder("Gemma2")
    model.config.architectures = ["Gemma2ForCausalLM"]
    model.config.save_pretrained(folder)
    return folder


def test_tables(gemma: Path) -> None:
    done = run(gemma, "--mechanisms", "softmax,linear")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "Gemma2ForCausalLM: 3 attention layers"
    windowed, whole = lines[2].split(), lines[3].split()
    assert windowed[:2] == ["0,2", "model.layers.0.self_attn"]
    assert windowed[3:] == ["causal_self", "4", "on", "2", "8", "4", "softcap", "2"]
    assert whole == ["1", "model.layers.1.self_attn", *windowed[3:8], "-", "softcap", "2"]
    yes = [line for line in lines if line.endswith("  yes")]
    assert [line.split()[0] for line in yes] == ["softmax", "softmax"]
    assert any("linear" in x and "no: the layer has a window of 4, and the op" in x for x in lines)


def test_json_has_every_layer_and_every_mechanism(gemma: Path) -> None:
    done = run(gemma, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [layer["window"] for layer in found["layers"]] == [4, None, 4]
    assert all(list(x["mechanisms"]) == list(regard.mechanisms) for x in found["layers"])
    done = run(gemma, "--json", "--layers", "1", "--mechanisms", "softmax")
    (layer,) = json.loads(done.stdout)["layers"]
    assert layer["number"] == 1
    assert layer["mechanisms"] == {"softmax": None}


def test_the_same_as_the_model_itself_says(gemma: Path) -> None:
    own = regard.adapt.report(tiny.decoder("Gemma2")).to_json()
    assert json.loads(run(gemma, "--json").stdout) == own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mechanisms", "sofmax"], "did you mean 'softmax'"),
        (["--mechanisms", ","], "--mechanisms must be names"),
        (["--layers", "7"], "layers must be below 3, the number of attention layers"),
        (["--layers", "0,model.layers.9.self_attn"], "did you mean 'model.layers."),
        (["--layers", "*.cross"], "layers must be paths of attention layers"),
    ],
)
def test_wrong_choices(gemma: Path, arguments: list[str], words: str) -> None:
    check_refused(run(gemma, *arguments), words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "with a config.json, as save_pretrained of transformers writes it, got none"),
        ("{", "cannot be read as JSON"),
        ("[]", "has a model_type of transformers"),
        ('{"architecture": "vit_tiny_patch16_224"}', "models of timm: regard.adapt.timm.report"),
        ('{"model_type": "perceptron"}', "transformers makes no model of"),
        ('{"model_type": "bert", "num_attention_heads": 7}', "transformers makes no model of"),
        ('{"model_type": "resnet"}', "AttentionInterface of transformers"),
    ],
)
def test_wrong_folders(tmp_path: Path, config: str | None, words: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    check_refused(run(tmp_path), words)


def test_no_folder_at_all(tmp_path: Path) -> None:
    check_refused(run(tmp_path / "none"), "MODEL_DIR must be a folder, got")


def test_it_is_in_the_help() -> None:
    assert "swap-report" in CliRunner().invoke(app, ["--help"]).stdout
    assert "MODEL_DIR" in run("--help").stdout


def check_refused(done: Result, words: str) -> None:
    """Exit code 2, one line of error, no report."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert words in done.stderr
    assert done.stderr.startswith("regard swap-report: ")
    assert done.stderr.count("\n") == 1
