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
    from regard import (
        adapt,
        bench,
        lens,
        mixers,
        models,
        parallel,
        recipes,
        sklearn,
        sparse,
        steer,
        tasks,
        testing,
    )  # fmt: skip
    from regard.bench.compare import compare
    from regard.models import create_model
    from regard.torch_api import scaled_dot_product_attention

try:
    __version__ = version("regard")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0.0.0"

mechanisms = Mechanisms("regard.ops")

# Rooms that a call of an op does not need are imported when they are first named: a module, or
# `module:attribute`.
_LAZY = {
    "adapt": "regard.adapt",
    "bench": "regard.bench",
    "compare": "regard.bench.compare:compare",
    "create_model": "regard.models:create_model",
    "lens": "regard.lens",
    "mixers": "regard.mixers",
    "models": "regard.models",
    "native": "regard.native",
    "parallel": "regard.parallel",
    "recipes": "regard.recipes",
    "scaled_dot_product_attention": "regard.torch_api:scaled_dot_product_attention",
    "sklearn": "regard.sklearn",
    "sparse": "regard.sparse",
    "steer": "regard.steer",
    "tasks": "regard.tasks",
    "testing": "regard.testing",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "Card",
    "Case",
    "Operand",
    "Paper",
    "Pattern",
    "adapt",
    "bench",
    "compare",
    "create_model",
    "explain",
    "lens",
    "load_state",
    "mechanisms",
    "mixers",
    "models",
    "native",
    "ops",
    "parallel",
    "recipes",
    "scaled_dot_product_attention",
    "sklearn",
    "sparse",
    "steer",
    "tasks",
    "testing",
]
