"""Doctests become code on the pages."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("griffe")
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "docs/doctests.py"))


def test_examples_are_fenced_and_nothing_else() -> None:
    text = "Adds.\n\nx > y\n\n>>> for x in [1]:\n...     print([x])\n[1]\n\nMore.\n\n>>> 2\n2"
    wanted = (
        "Adds.\n\nx > y\n\n```pycon\n>>> for x in [1]:\n...     print([x])\n[1]\n```\n\nMore.\n\n"
        "```pycon\n>>> 2\n2\n```"
    )
    assert SCRIPT["fenced"](text) == wanted
    assert SCRIPT["fenced"]("Nothing here.\n\n    a >>> b\n") == "Nothing here.\n\n    a >>> b\n"


def test_indented_examples_stay_where_they_are() -> None:
    text = "Args:\n    x: a number\n\n        >>> x\n        [1]\n\n        more"
    wanted = "        ```pycon\n        >>> x\n        [1]\n        ```\n\n        more"
    assert SCRIPT["fenced"](text).endswith(wanted)
