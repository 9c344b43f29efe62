"""The performance pages are made from the results files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/performance.py"))
PAGES = ("performance_cpu.md", "performance_gpu.md", "regression.md")
RESULTS = sorted([*SCRIPT["RESULTS"].glob("cpu_*.json"), *SCRIPT["RESULTS"].glob("gpu*.json")])


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert "{{ " in text
    filled = SCRIPT["filled"](text)
    assert "{{ " not in filled
    drawn = SCRIPT["pictures"]()
    for place in [part.split(")")[0] for part in filled.split("](")[1:]]:
        if place.startswith("figures/"):
            assert place in drawn


def test_without_a_file_the_page_says_so(tmp_path: Path) -> None:
    names = SCRIPT["filled"].__globals__
    before = {name: names[name] for name in ("RESULTS", "TRAINED")}
    names.update(RESULTS=tmp_path, TRAINED=tmp_path / "none.json")
    try:
        for text in ("{{ kernels cpu }}", "{{ kernels gpu }}", "{{ trained }}"):
            assert SCRIPT["filled"](text) == SCRIPT["NOT_YET"]
        assert SCRIPT["pictures"]() == {}
    finally:
        names.update(before)


def test_committed_results_are_whole_and_right() -> None:
    for path in RESULTS:
        found = json.loads(path.read_text())
        assert found["complete"], path
        assert found["wrong"] == [], path
        assert {"regard", "torch", "python"} <= set(found["versions"])
        assert found["date"]
