"""Doctests of docstrings become blocks of code on the pages.

Without this a paragraph that starts with `>>>` is Markdown: three nested quotations, and lists in
its output are taken for links.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a prompt to the next empty line, at any indentation.
EXAMPLE = re.compile(r"^([ ]*)>>> .*(?:\n(?![ ]*$).+)*", re.M)


def fenced(text: str) -> str:
    """The text with every doctest between fences.

    >>> print(fenced("Adds.\\n\\n>>> add(1, 2)\\n3\\n"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> add(1, 2)
    3
    ```
    <BLANKLINE>
    """
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class Doctests(griffe.Extension):
    """Puts fences into every docstring that the pages show."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
