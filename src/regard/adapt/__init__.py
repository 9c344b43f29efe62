"""Into other people's models: their attention layers get a mechanism of ours, and give it back.

`regard.adapt.transformers` serves models of the library transformers, `regard.adapt.timm` vision
transformers of timm; `site.py`, `fitting.py`, `learned.py`, `swapped.py` and `reporting.py` are
what both need. Four calls of the first are here as well:

    report(model)                                which layer can take which mechanism, or why not
    swap(model, "local_linear", ridge=1e4)       put it in
    restore(model)                               as it was
    register()                                   for model.set_attn_implementation("regard:...")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.adapt import timm, transformers
    from regard.adapt.transformers import register, report, restore, swap

_MODULES = ("timm", "transformers")
_CALLS = ("register", "report", "restore", "swap")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"regard.adapt.{name}")
    if name in _CALLS:
        return getattr(importlib.import_module("regard.adapt.transformers"), name)
    raise AttributeError(f"module 'regard.adapt' has no attribute {name!r}")


__all__ = ["register", "report", "restore", "swap", "timm", "transformers"]
