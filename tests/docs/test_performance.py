"""The performance pages are made from the results files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/performance.py"))
PAGES = ("performance_cpu.md", "performance_gpu.md", "regression.md")
KINDS = ("cpu_*.json", "threads_*.json", "gpu*.json")
RESULTS = sorted(path for kind in KINDS for path in SCRIPT["RESULTS"].glob(kind))


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


def test_threads_measured_alone_replace_those_of_the_whole_run(tmp_path: Path) -> None:
    whole = json.loads((SCRIPT["RESULTS"] / "cpu_avx512.json").read_text())
    row = {
        **whole["threaded"][0], "name": "newer", "gain": 1.87, "median_gain": 1.86,
        "targets": [{"quantity": "threads", "most": None, "least": 1.9, "level": "must",
                     "value": 1.87, "met": False}],
    }  # fmt: skip
    alone = {**whole, "threaded": [row], "left_out": [], "rows": [], "date": "2030-01-02"}
    (tmp_path / "cpu_avx512.json").write_text(json.dumps(whole))
    (tmp_path / "threads_avx512.json").write_text(json.dumps(alone))
    names = SCRIPT["filled"].__globals__
    before = names["RESULTS"]
    names["RESULTS"] = tmp_path
    try:
        page = SCRIPT["filled"]("{{ kernels cpu }}")
    finally:
        names["RESULTS"] = before
    assert "| newer | 125 | 80.1 | 1.87 | 1.86 | 9 | **missed:** ≥ 1.9 |" in page
    assert "by themselves on 2030-01-02" in page
    assert "- newer: threads 1.87, wanted ≥ 1.9" in page
    assert whole["threaded"][-1]["name"] not in page


def test_the_page_of_a_gpu_is_made_from_its_file(tmp_path: Path) -> None:
    whole = json.loads((SCRIPT["RESULTS"] / "cpu_avx512.json").read_text())
    base = next(r for r in whole["rows"] if r["section"] == "forward" and r["dim"] == 64)
    rows = []
    for n, milliseconds in ((4096, 0.5), (16384, 6.25)):
        for options in ({"tol": 1e-2}, {}):
            times = {"forward": milliseconds, "flash forward": 2.0, "cuDNN forward": 1.0}
            numbers = {"forward/flash": milliseconds / 2, "forward/cuDNN": milliseconds}
            target = {"quantity": "forward/flash", "most": 3.0, "least": None, "level": "must",
                      "value": milliseconds / 2, "met": milliseconds < 6}  # fmt: skip
            rows.append({
                **base, "impl": "triton", "form": "triton", "length": n, "ridge": 1.0,
                "options": options, "milliseconds": times, "numbers": numbers,
                "milliseconds_of_a_call": {"forward": milliseconds + 0.1},
                "targets": [target] if options else [], "name": f"row {n} {options}",
            })  # fmt: skip
    sparse = {**rows[0], "section": "chosen blocks", "mechanism": "block_sparse", "name": "blocks"}
    made = {
        **whole, "device": "cuda", "machine": {"gpu": "Imagined 9000"}, "threaded": [],
        "rows": [*rows, {**sparse, "keys": "normal"}], "checks": [], "left_out": [], "fuzz": [],
    }  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(made))
    names = SCRIPT["filled"].__globals__
    before = names["RESULTS"]
    names["RESULTS"] = tmp_path
    try:
        page = SCRIPT["filled"]((ROOT / "docs/performance_gpu.md").read_text())
        drawn = SCRIPT["pictures"]()
    finally:
        names["RESULTS"] = before
    assert "## Imagined 9000" in page
    assert "| call | ms | / flash | / cuDNN | of a call, ms |" in page
    (row,) = (line for line in page.splitlines() if line.startswith("| row 16384 {'tol'"))
    assert "| 6.25 | 3.12x | 6.25x | 6.35 |" in row
    assert "forward/flash 3.12, ≤ 3: **missed**" in row
    assert "- row 16384 {'tol': 0.01}: forward/flash 3.12, wanted ≤ 3" in page
    assert "### Block-sparse attention\n" in page
    assert "![" in page
    assert "figures/gpu_lengths.svg" in drawn
    assert "figures/gpu_lengths.svg" in page
