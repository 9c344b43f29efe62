"""Imports point downwards only, never sideways."""

from __future__ import annotations

from pathlib import Path

import pytest

from guards.sources import PACKAGE, Import, files, imports, module_name

# The floors of the house, the ground first. A room imports from itself and from lower floors.
FLOORS = (
    ("core",),
    ("native", "gpu"),
    ("ops",),
    ("mixers", "tasks", "parallel"),
    ("models", "adapt", "lens"),
    ("steer",),
    ("explain", "torch_api", "sparse"),
    ("",),  # the package itself, whose names the rooms above may use
    ("testing",),
    ("bench", "recipes", "sklearn"),
    ("apps",),
    ("cli", "web", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ENGINES = {"linear", "local_linear", "block_sparse", "window"}
SIDEWAYS = {("adapt", "lens.tap"), ("__main__", "cli")}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def fault(found: Import, own: str) -> str | None:
    """Why an import of module `own` is against the rules, or None."""
    if found.module.split(".")[0] != "regard":
        return None
    here, there = room(own), room(found.module)
    for name in (here, there):
        if name not in FLOOR:
            return f"{found}: {name!r} stands on no floor of FLOORS"
    if here == there == "ops":
        return _fault_within_ops(found, own)
    if here == there or FLOOR[there] < FLOOR[here]:
        return None
    if here == "" and FLOOR[there] < FLOOR["cli"]:
        return None  # the package offers what lies below the command line
    if any(here == a and found.module.startswith(f"regard.{b}") for a, b in SIDEWAYS):
        return None
    direction = "sideways" if FLOOR[there] == FLOOR[here] else "upwards"
    return f"{found}: {direction}, from {here or 'regard'} to {there or 'regard'}"


def _fault_within_ops(found: Import, own: str) -> str | None:
    folder = [*own.split("."), ""][2]
    other = [*found.module.split("."), ""][2]
    if folder in ("", other) or other in ENGINES:
        return None
    return f"{found}: sideways, from ops/{folder} to ops/{other or '__init__'}, which is no engine"


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    faults = [fault(found, module_name(path)) for found in imports(path)]
    assert not [text for text in faults if text]


@pytest.mark.parametrize(
    ("own", "line", "why"),
    [
        ("regard.core.card", "from regard.ops import linear", "upwards, from core to ops"),
        ("regard.core.card", "import regard", "upwards, from core to regard"),
        ("regard.core.card", "from regard import explain", "upwards, from core to explain"),
        ("regard.ops.softmax", "from regard.mixers import x", "upwards"),
        ("regard.ops.softmax.card", "from regard.ops.linear import y", None),
        ("regard.ops.linear", "from regard.ops.softmax import y", "no engine"),
        ("regard.ops.softmax", "from regard import ops", "no engine"),
        ("regard.tasks.series", "from regard.mixers import x", "sideways"),
        ("regard.adapt.transformers", "from regard.lens.tap import Tap", None),
        ("regard.adapt.transformers", "from regard.lens.maps import x", "sideways"),
        ("regard.testing.laws", "from regard.explain import explain", None),
        ("regard.bench.speed", "import regard", None),
        ("regard.bench.speed", "from regard.cli.output import x", "upwards"),
        ("regard.cli.list", "from regard.bench import compare", None),
        ("regard.__main__", "from regard.cli import main", None),
        ("regard", "from regard.bench.compare import compare", None),
        ("regard", "from regard.cli import main", "upwards"),
        ("regard.core.x", "from regard.cellar import main", "no floor"),
        ("regard.core.x", "from . import card", None),
        ("regard.core.x", "from ..ops import linear", "upwards"),
        ("regard.core.x", "import torch", None),
    ],
)
def test_the_rule_itself(tmp_path: Path, own: str, line: str, why: str | None) -> None:
    package = tmp_path / "regard"
    parts = own.split(".")[1:]
    path = package.joinpath(*parts, "__init__.py") if len(parts) < 2 else None
    path = path or package.joinpath(*parts).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("ops/linear", "explain", "lens"):
        (package / name).mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    found = [Import(PACKAGE / "x.py", i.line, i.module) for i in imports(path, package)]
    faults = [text for text in (fault(i, own) for i in found) if text]
    if why is None:
        assert not faults
    else:
        assert faults
        assert why in faults[0]
