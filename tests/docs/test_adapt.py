"""The page on other people's models says what models and results say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
UPGRADE = runpy.run_path(str(ROOT / "benchmarks/upgrade.py"))
MATRIX = runpy.run_path(str(ROOT / "benchmarks/swap_matrix.py"))
RESULTS = json.loads(UPGRADE["RESULTS"].read_text())
PAGE = UPGRADE["PAGE"].read_text()


def test_tables_of_the_upgrade_are_up_to_date() -> None:
    filled = UPGRADE["fill"](PAGE, UPGRADE["tables"](RESULTS))
    assert filled == PAGE, "run: python benchmarks/upgrade.py --page"


def test_what_fits_where_is_up_to_date() -> None:
    filled = UPGRADE["fill"](PAGE, {"mechanisms": MATRIX["mechanisms"]()})
    assert filled == PAGE, "run: python benchmarks/swap_matrix.py"


def test_every_family_is_within_what_is_promised() -> None:
    table = PAGE.partition("<!-- families -->")[2].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == list(MATRIX["FAMILIES"].values())
    for row in rows:
        assert all(float(cell) <= 1e-5 for cell in row[2:6] if cell.strip())


def test_models_start_as_the_same_function() -> None:
    for row in RESULTS["start"]:
        assert min(row["moved"].values()) < 1e-3, row["model"]
    for run in RESULTS["learned"]["runs"]:
        starts = [arm["start"] for arm in run["arms"].values()]
        assert max(starts) - min(starts) < 1e-5


def test_the_page_may_say_that_neither_gains() -> None:
    arms = [arm for run in RESULTS["learned"]["runs"] for arm in run["arms"].values()]
    changes = sorted(abs(arm["end"] - arm["start"]) for arm in arms)
    assert changes[-1] < 3e-4
    assert changes[-2] < 1e-4
    first = RESULTS["learned"]["runs"][0]
    near = [ridge for heads in first["near"]["heads"].values() for ridge in heads["ridge"]]
    said = f"from {first['near']['start']:.4f} to {first['near']['end']:.4f}"
    assert said in PAGE
    assert f"ridges of {min(near):.0f} to {max(near):.0f}" in PAGE


def test_a_page_without_places_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for 'upgrade'"):
        UPGRADE["fill"]("no marks", {"upgrade": "| |"})
