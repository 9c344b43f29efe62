"""The page on real models is made from the results files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/real_models.py"))


def test_placeholders_are_filled() -> None:
    text = (ROOT / "docs/real_models.md").read_text()
    assert "{{ real speech }}" in text
    assert "{{ real sentences }}" in text
    filled = SCRIPT["filled"](text)
    assert "{{ real" not in filled
    assert "| [CLS] |" in filled


def test_the_page_on_cross_attention_is_filled() -> None:
    text = (ROOT / "docs/cross_attention.md").read_text()
    filled = SCRIPT["filled"](text)
    assert "{{" in text
    assert "{{" not in filled
    row = dict.fromkeys(("all", "best_head", "median_head", "value_weighted", "ceiling"), 0.5)
    places = ("attention", "value_weighted", "encoder_output", "input", "chance")
    models = [
        {
            "right": right,
            "agreement": {"encoder_output": {**row, "all": right / 2}, "input": row},
            "on_the_sound": dict.fromkeys(places, 0.25),
        }
        for right in (0.9, 1.0)
    ]
    made = SCRIPT["copying"]({"models": models, "sequences": 3, "runs": 7})
    assert "2 models that write 95.0 % of the sounds right" in made
    cells = "0.47 (0.45 to 0.50) | 0.50 (0.50 to 0.50) |"
    assert f"| encoder's output, hidden | {cells}" in made
    assert "| chance | 0.25 (0.25 to 0.25) |" in made


def test_the_files_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCRIPT["filled"].__globals__, "RESULTS", tmp_path)
    both = "{{ real speech }}{{ real sentences }}"
    assert SCRIPT["filled"](both) == 2 * SCRIPT["NOT_YET"]
    row = {
        "all": 0.3, "spearman": 0.25, "alignment_heads": 0.4, "best_head": 0.5, "median_head": 0.1,
        "layer": [0.1, 0.2],
    }  # fmt: skip
    names = ("input_zero", "input_minimum", "gradient", "input_x_gradient")
    agreement = {"encoder_output": {**row, "ceiling": 0.6}} | dict.fromkeys(names, row)
    times = {
        "matched": 9, "words": 10, "median_start_error": 0.05, "mean_start_error": 0.07,
        "within_0.1_s": 0.8, "within_0.2_s": 1.0, "overlap": 0.9,
    }  # fmt: skip
    area = {"attention": 50.0, "input_zero": 60.0, "chance": 40.0}
    sentence = {
        "name": "1", "seconds": 3.0, "tokens": 12, "word_error_rate": 20.0, "hypothesis": " He.",
        "input_zero": {"mean_pooling": 0.15},
    }  # fmt: skip
    found = {
        "runs": 7,
        "summary": {"agreement": agreement, "alignment": times, "deletion_area": area},
        "sentences": [sentence],
    }
    (tmp_path / "real_speech.json").write_text(json.dumps(found))
    text = SCRIPT["filled"]("{{ real speech }}")
    assert "| 1 | 3.0 | 12 | 20 | He. |" in text
    assert "off by 50 ms in the median" in text
    cells = "0.30 | 0.25 | 0.40 | 0.50 | 0.10 | 0.10 0.20 | 0.60 | 0.50 |"
    assert f"| encoder's output, hidden | {cells}" in text
    assert "28 with hidden encoder output" in text
    assert "hidden by 0: 0.15 for all heads" in text
