"""The page on heads of a Vision Transformer is made from the results file."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/vit_heads.py"))


@pytest.mark.parametrize("page", ["vit_analytics.md", "real_models.md"])
def test_placeholders_are_filled(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert "{{ vit curves }}" in text
    filled = SCRIPT["filled"](text)
    assert "{{ vit" not in filled
    assert "| least important first |" in filled


def test_numbers_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "prob_drop", "abs_prob_change", "jsd", "loss_increase", "cls_cosine_distance", "cls_l2",
        "grad_sensitivity",
    ]  # fmt: skip
    found = {
        "curve_images": 4,
        "images": 8,
        "importance_cpu_s": 12.4,
        "removed": [0, 2],
        "curves": {"least important first": [1.0, 0.75]},
        "areas": {"least important first": 0.875},
        "importance": {name: [[0.1, 0.2]] for name in names},
        "agreement": [[0.25] * 7] * 7,
        "interval": {"loss_increase": [[[0.1, -0.2]], [[0.2, -0.1]]]},
        "speed": {
            "ViT, 1 images": {
                "naive_s": 3.0, "prefix_s": 2.0, "prefix_and_copies_s": 1.0,
                "faster_by_prefix": 1.5, "faster": 3.0,
            }
        },
        "profile": {
            "mean_distance": [[1.0, 2.0]],
            "normalised_entropy": [[0.5, 0.7]],
            "patches_to_cls": [[0.0, 0.5]],
        },
        "patterns": {
            "images": 8, "names": ["self", "row_above"], "fit": [0.9, 0.8], "share": [1, 3],
            "silhouette": 0.5, "purity": [[1.0, 0.75]], "held_out_error": 0.1, "pca_error": 0.2,
        },
    }  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(found))
    monkeypatch.setitem(SCRIPT["filled"].__globals__, "RESULT", tmp_path / "found.json")
    text = SCRIPT["filled"]("{{ vit curves }}{{ vit speed }}{{ vit layers }}{{ vit patterns }}")
    assert "| least important first | 100 | 75 | 88 |" in text
    assert "1 raise the loss by more than chance" in text
    assert "1 lower it (below 0)" in text
    assert "| ViT, 1 image | 3.00 | 2.00 | 1.00 | 1.5× | 3.0× |" in text
    assert "| 0 | 1.50 | 0.60 | 0.25 |" in text
    assert "| 1 | row above | 0.80 | 75 |" in text
    assert "1 of 2 heads have the same pattern on all 8 images" in text
