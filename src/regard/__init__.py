"""Attention you can trust, compare and swap.

`regard.ops` are functions of (q, k, v); `regard.mechanisms` are their cards by name;
`regard.explain(op, ...)` says which form of an op would run and why not the others.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from regard import native, ops
from regard.core.card import Card, Case, Operand, Paper
from regard.core.patterns import Pattern
from regard.core.registry import Mechanisms
from regard.core.state import load_state
from regard.explain import explain

if TYPE_CHECKING:
    from regard import bench, native, tasks, testing
    from regard.bench.compare import compare

try:
    __version__ = version("regard")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0.0.0"

mechanisms = Mechanisms("regard.ops")

# Rooms that a call of an op does not need are imported when they are first named.
_LAZY = {
    "bench": "regard.bench",
    "compare": "regard.bench.compare",
    "native": "regard.native",
    "tasks": "regard.tasks",
    "testing": "regard.testing",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module.compare if name == "compare" else module


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "Card",
    "Case",
    "Operand",
    "Paper",
    "Pattern",
    "bench",
    "compare",
    "explain",
    "load_state",
    "mechanisms",
    "native",
    "ops",
    "tasks",
    "testing",
]
