"""Measuring: which mechanism predicts best on data and at what cost, which is the fastest here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.bench.timing import speed

__all__ = ["speed"]


def __getattr__(name: str) -> Any:
    if name == "speed":
        from regard.bench.timing import speed

        return speed
    raise AttributeError(f"module 'regard.bench' has no attribute {name!r}")
