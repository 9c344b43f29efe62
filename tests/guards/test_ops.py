"""Every public op is exported once, and its docstring says what it must."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import regard
from guards.sources import PACKAGE
from regard import ops

OPS = sorted(regard.ops.__all__)
# What must be found: in the whole docstring, or under the heading of that name.
ANYWHERE = {
    "one line of meaning": r"\A[A-Z][^\n]+\.\n\n",
    "a formula": r"^ {4,}\S.* = ",
    "shapes": r"\[B, H, T, D",
    "a doctest": r"^\s*>>> ",
}
HEADINGS = {
    "Precision": r"float",
    "Cost": r"O\(",
    "Source": r"\d{4}",
    "Limits": r"\w",
    "Raises": r"Error",
}


def sections(docstring: str) -> dict[str, str]:
    """Heading -> text; the text follows on the line of the heading or indented below it."""
    parts = re.split(r"^([A-Z]\w+):", docstring.split("\n>>> ")[0], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("what", ANYWHERE)
def test_docstring_has(name: str, what: str) -> None:
    docstring = inspect.getdoc(getattr(regard.ops, name)) or ""
    assert re.search(ANYWHERE[what], docstring, re.M), f"{name} lacks {what}"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("heading", HEADINGS)
def test_docstring_says_under(name: str, heading: str) -> None:
    found = sections(inspect.getdoc(getattr(regard.ops, name)) or "")
    assert heading in found, f"{name} has no {heading}:"
    assert re.search(HEADINGS[heading], found[heading]), f"{name}, {heading}: {found[heading]}"


def test_the_op_of_every_folder_with_a_card_is_exported() -> None:
    """And what a folder has beside it only under its own name: an alias, a look inside."""
    folders = [path.parent.name for path in (PACKAGE / "ops").glob("*/card.py")]
    ops = {name: regard.mechanisms[name].op for name in folders}
    assert {op.__name__ for op in ops.values()} <= set(OPS)
    for op in ops.values():
        assert getattr(regard.ops, op.__name__) is op
    for name in OPS:
        function = getattr(regard.ops, name)
        home = function.__module__.removeprefix("regard.ops.").split(".")[0]
        assert function.__name__ == name
        assert home in folders
        public = importlib.import_module(f"regard.ops.{home}")
        assert name in getattr(public, "__all__", [name])
        assert getattr(public, name) is function


@pytest.mark.parametrize("name", OPS)
def test_no_op_takes_arbitrary_arguments(name: str) -> None:
    kinds = {p.kind for p in inspect.signature(getattr(regard.ops, name)).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def test_the_lists_of_functions_agree() -> None:
    """What editors see, what is imported when it is named, and what is public."""
    tree = ast.parse(Path(ops.__file__).read_text())
    typed = {
        node.module.removeprefix("regard.ops."): tuple(alias.name for alias in node.names)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regard.ops.")
    }
    assert typed == ops._FOLDERS
    assert sorted(name for names in typed.values() for name in names) == sorted(ops.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ops.nothing  # noqa: B018
