"""The page on the regressor says what its results say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/regressor.py"))
RESULTS = json.loads(SCRIPT["RESULTS"].read_text())


def test_tables_of_the_page_are_up_to_date() -> None:
    page = SCRIPT["PAGE"].read_text()
    assert SCRIPT["filled"](page, RESULTS) == page, "run: python benchmarks/regressor.py --page"


def test_every_data_set_and_method_is_there() -> None:
    names = {name: X.shape for name, _, X, _ in SCRIPT["data_sets"]()}
    assert {name: (e["rows"], e["features"]) for name, e in RESULTS["data"].items()} == names
    for entry in RESULTS["data"].values():
        assert list(entry["methods"]) == list(SCRIPT["methods"](entry["features"]))


def test_the_page_may_say_where_it_loses() -> None:
    t = {name: {m: s["t"] for m, s in e["methods"].items()} for name, e in RESULTS["data"].items()}
    assert (
        t["friedman1"]["gradient boosting"]
        < -SCRIPT["NOISE"]
        < t["friedman1, five"]["gradient boosting"]
    )
    for name, others in t.items():
        behind = {m for m, value in others.items() if value < -SCRIPT["NOISE"]}
        assert ("kernel ridge" in behind) == name.startswith("friedman")
        assert name.startswith("friedman") or not behind
        assert others["local average"] > 0


def test_findings_name_losses_and_wins() -> None:
    methods = {
        SCRIPT["OURS"]: {"rmse": 1.0, "t": 0.0},
        "a": {"rmse": 0.5, "t": -3.0},
        "b": {"rmse": 2.0, "t": 3.0},
        "c": {"rmse": 1.1, "t": 1.0},
    }
    entry = {"task": "y", "rows": 9, "features": 2, "deviation": 2.0, "methods": methods}
    results = {"data": {"made up": entry}}
    assert "loses to a; beats b; within the noise of c." in SCRIPT["findings"](results)
    row = SCRIPT["table"](results).splitlines()[-1]
    assert row == "| made up | 9 x 2 | 0.500 | **0.250** | 1.000 | 0.550 |"
    with pytest.raises(ValueError, match="mark errors once"):
        SCRIPT["filled"]("no marks", results)


def test_errors_of_one_method_are_measured_anew() -> None:
    """The recorded error of ours, on the data set that takes least time."""
    from sklearn.model_selection import KFold, cross_val_predict

    X, y = next((X, y) for name, _, X, y in SCRIPT["data_sets"]() if name == "iris")
    model, outer = SCRIPT["methods"](3)[SCRIPT["OURS"]], KFold(5, shuffle=True, random_state=0)
    rmse = float((((cross_val_predict(model, X, y, cv=outer) - y) ** 2).mean()) ** 0.5)
    recorded = RESULTS["data"]["iris"]["methods"][SCRIPT["OURS"]]["rmse"]
    assert rmse == pytest.approx(recorded, rel=1e-2)  # a near-tie may be settled otherwise
