"""The experiments on real models and on a model of known alignment, at a small size."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    threads = torch.get_num_threads()
    try:
        assert runpy.run_path(str(BENCHMARKS / name))["main"]() == 0
    finally:
        torch.set_num_threads(threads)


def test_a_small_model_of_known_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, few = tmp_path / "found.json", ["--steps", "2", "--seeds", "1", "--sequences", "2"]
    _run(
        "copy_alignment.py", monkeypatch,
        *few, "--runs", "16", "--out", str(out), "--figures", str(tmp_path),
    )  # fmt: skip
    (model,) = json.loads(out.read_text())["models"]
    for told in model["agreement"].values():
        assert -1 <= told["median_head"] <= told["best_head"] <= 1
        assert 0 <= told["ceiling"] <= 1
    assert all(0 <= share <= 1 for share in model["on_the_sound"].values())
    assert (tmp_path / "copy_alignment.png").stat().st_size > 1000


def test_sounds_are_where_they_are_said_to_be() -> None:
    script = runpy.run_path(str(BENCHMARKS / "copy_alignment.py"))
    spectra = torch.randn(script["SOUNDS"], script["BANDS"])
    generator = torch.Generator().manual_seed(0)
    spectrograms, tokens, spans = script["sequences"](4, spectra, generator)
    for spectrogram, row, mine in zip(spectrograms, tokens, spans, strict=True):
        assert row[0] == script["START"]
        assert row[1 + len(mine)] == script["END"]
        for token, (start, stop) in zip(row[1:].tolist(), mine, strict=False):
            heard = spectrogram[:, start:stop].mean(1)
            distances = (spectra - heard).norm(dim=1)
            assert int(distances.argmin()) == token - script["FIRST"]
    perfect = torch.zeros(1, 50)
    perfect[0, 3:6] = 1
    assert script["on_the_sound"](perfect, [(6, 12)]) == 1
    assert script["on_the_sound"](perfect, [(20, 24)]) == 0


@pytest.mark.slow
@pytest.mark.requires("resource:whisper_tiny", "resource:librivox", "captum", "skimage")
def test_real_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(BENCHMARKS / "real_speech.py"))
    utterance = min(script["resources"].librivox(), key=lambda told: told.seconds)
    found, _ = script["sentence"](utterance, 12, seed=0)
    assert found["word_error_rate"] < 30
    assert found["rows_sum_to_one"] < 1e-5
    assert sum(found["alignment"]["overlap"]) >= 0.8 * len(found["alignment"]["overlap"])
    # Gradients need no runs: attention agrees with them whatever the number of runs is.
    assert found["gradient"]["pearson"]["all"] > 0.2
    areas = {name: curve["area"] for name, curve in found["deletion"].items()}
    assert areas["attention"] > areas["chance"]
    told = script["summary"]([found])
    assert set(told["agreement"]) == {
        "encoder_output", "input_zero", "input_minimum", "gradient", "input_x_gradient",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.requires("resource:minilm")
def test_real_sentences() -> None:
    script = runpy.run_path(str(BENCHMARKS / "real_sentences.py"))
    judge, scores = script["Judge"](), script["scores"]
    common = {"theta": None, "alpha": script["ALPHA"], "spare_first": False}
    calibrate = script["act_calibration"]
    plain = judge.similarities()
    assert torch.equal(plain, judge.similarities(calibrate(judge.model, beta=1.0, **common)))
    before = scores(plain)
    assert before["area"] == pytest.approx(1.0)
    assert before["margin"] > 0.6
    # Taking the attention away from all sinks of all heads makes the vectors worse.
    after = scores(judge.similarities(calibrate(judge.model, beta=0.0, **common)))
    assert after["margin"] < before["margin"] - 0.2
    assert torch.equal(plain, judge.similarities())  # and nothing of it stays


@pytest.mark.slow
@pytest.mark.requires("resource:minilm", "resource:whisper_tiny", "resource:librivox")
def test_pictures_of_the_page_on_lenses(tmp_path: Path) -> None:
    main = runpy.run_path(str(BENCHMARKS.parent / "docs/figures/lens.py"))["main"]
    main.__globals__["FIGURES"] = tmp_path
    threads = torch.get_num_threads()
    try:
        assert main() == 0
    finally:
        torch.set_num_threads(threads)
    page = (BENCHMARKS.parent / "docs/lens.md").read_text()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"figures/(lens_\w+\.png)", page))
