"""The pages on the tap and on ACT are made from the result files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "tap_costs.py"))


def test_every_measured_row_is_in_the_table() -> None:
    table = SCRIPT["table"]()
    rows = json.loads((SCRIPT["RESULTS"] / "tap.json").read_text())["rows"]
    assert {row["tap"] for row in rows} == set(SCRIPT["WHAT"])
    assert table.count("\n") == 2 + len(SCRIPT["WHAT"])
    assert all(f"{row['time_ratio']:.2f}" in table for row in rows)
    assert "{{ tap }}" in (DOCS / "tap.md").read_text()


def test_ratios_of_act_are_on_its_page() -> None:
    page = (DOCS / "steering/act.md").read_text()
    for name in SCRIPT["ACT"]:
        assert f"{{{{ {name} }}}}" in page
        assert float(SCRIPT["act"](name)) >= 1.0
