"""The pages on many devices and on the linear family are made from the results files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/measured.py"))


@pytest.mark.parametrize("page", ["parallel.md", "which_linear.md"])
def test_placeholders_are_filled(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert "{{ " in text
    assert "{{ " not in SCRIPT["filled"](text)


def test_a_file_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = SCRIPT["filled"].__globals__
    monkeypatch.setitem(names, "RESULTS", tmp_path)
    assert SCRIPT["filled"]("{{ parallel }}{{ which linear }}") == 2 * SCRIPT["NOT_YET"]
    about = {
        "versions": {"torch": "2.11"}, "date": "2026-11-25",
        "machine": {"gpu": "A card", "processor": "A chip", "instruction_sets": {"torch": "X"}},
    }  # fmt: skip
    row = {
        "op": "gated_delta", "impl": "triton", "work": "forward", "length": 65536, "ranks": 2,
        "milliseconds": {"one": 3.0, "all": 2.0}, "gain": 1.5, "bytes": 262208,
    }  # fmt: skip
    found = {**about, "ranks": 2, "heads": 16, "dim": 64, "dtype": "bfloat16", "left_out": []}
    found |= {"checks": [{"right": True}], "rows": [row]}
    (tmp_path / "parallel_cuda.json").write_text(json.dumps(found))
    text = SCRIPT["filled"]("{{ parallel }}")
    assert "### 2 of A card" in text
    assert "| gated delta | triton | forward | 64k | 3.00 | 2.00 | 1.50 | 262,208 |" in text
    row = {
        "mechanism": "relu_linear", "options": {}, "state": 4160, "pairs": 8, "error": 2e-7,
        "recalled_of_64": 0.36, "forms": {"1024": "native", "4096": "native"}, "noisy": True,
        "over_softmax": {"forward 1024": 0.2, "forward 4096": 0.05, "both 4096": 0.1}, "us": 9.0,
    }  # fmt: skip
    found = {**about, "lengths": [1024, 4096], "rows": [row]}
    (tmp_path / "which_linear.json").write_text(json.dumps(found))
    text = SCRIPT["filled"]("{{ which linear }}")
    cells = "4160 | 8 | 36 % | 0.200 | 0.0500 | 0.100 | 9.00 | 2e-07 | native |"
    assert f"| [relu linear](mechanisms/relu_linear.md) | {cells}" in text
    assert "not quiet" in text
