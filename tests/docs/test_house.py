"""The page on the house says what the code does."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import regard

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/house.md").read_text()


def _resolve(dotted: str) -> object:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{dotted} does not exist")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(regard(?:\.\w+)+)`", PAGE))))
def test_every_name_on_the_page_exists(name: str) -> None:
    assert _resolve(name) is not None


def test_rooms_are_the_folders() -> None:
    table = re.search(r"\| floor .*?\n\n", PAGE, re.S)
    assert table is not None
    listed = set()
    for row in table.group(0).splitlines()[2:]:
        if row.strip():
            listed |= set(re.findall(r"`(\w+)`", row.split("|")[2]))
    source = ROOT / "src/regard"
    built = {path.parent.name for path in source.glob("*/__init__.py")}
    built |= {path.stem for path in source.glob("*.py") if not path.stem.startswith("_")}
    assert listed == built


def test_a_call_flows_as_described() -> None:
    section = PAGE.split("## How a call flows")[1].split("\n## ")[0]
    described = re.findall(r"^\d+\. `regard\.([\w.]+)`", section, re.M)
    assert len(described) >= 5
    wanted = {_code(_resolve(f"regard.{name}")): name for name in described}
    seen: list[str] = []

    def watch(frame, event, argument):
        if event == "call" and frame.f_code in wanted:
            name = wanted[frame.f_code]
            if name not in seen:
                seen.append(name)

    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    _, state = regard.ops.softmax_attention(q, k, v, causal=True, return_state=True)
    sys.setprofile(watch)
    try:
        regard.ops.softmax_attention(
            q, k, v, causal=True, state=state, return_state=True, impl="eager"
        )
    finally:
        sys.setprofile(None)
    assert seen == described


def _code(item: object) -> object:
    function = item.__init__ if isinstance(item, type) else item
    return function.__code__


def test_picture_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/figures/flow.py"))["draw"]()
    assert (ROOT / "docs/figures/flow.svg").read_text() == drawn
