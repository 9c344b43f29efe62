"""A reference is a specification: it depends on no form, and no fast form depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from guards.sources import PACKAGE, files, imports, module_name

OPS = [path for path in files() if path.is_relative_to(PACKAGE / "ops")]
REFERENCES = [path for path in OPS if path.name == "reference.py"]
# Files that are one way to compute: `triton_backward.py` belongs to `triton.py`.
FAST = ("blockwise", "chunked", "recurrent", "direct", "eager", "sdpa", "native", "triton")
MAY_USE_THE_REFERENCE = {"__init__", "card", "forms", "reference"}
ALLOWED = {"__future__", "collections", "dataclasses", "jaxtyping", "math", "torch", "typing"}


def family(name: str) -> str | None:
    """The fast form that a file of this name belongs to."""
    return next((form for form in FAST if name == form or name.startswith(f"{form}_")), None)


def test_every_card_has_a_reference() -> None:
    cards = {path.parent for path in OPS if path.name == "card.py"}
    assert cards
    assert cards == {path.parent for path in REFERENCES}


@pytest.mark.parametrize("path", REFERENCES, ids=module_name)
def test_a_reference_imports_only_torch_math_and_core(path: Path) -> None:
    for found in imports(path):
        top = found.module.split(".")[0]
        assert top in ALLOWED or found.module.startswith("regard.core"), str(found)


@pytest.mark.parametrize("path", OPS, ids=module_name)
def test_forms_import_neither_each_other_nor_the_reference(path: Path) -> None:
    own = family(path.stem)
    for found in imports(path):
        if not found.module.startswith("regard.ops."):
            continue
        last = found.module.split(".")[-1]
        if last == "reference":
            assert path.stem in MAY_USE_THE_REFERENCE, str(found)
        other = family(last)
        assert own is None or other in (None, own), f"{found}: {own} may not use {other}"
