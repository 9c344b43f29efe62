"""The tables of the README are what the cards and the result files say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_tables_of_the_readme_are_up_to_date() -> None:
    readme = runpy.run_path(str(DOCS / "readme.py"))
    text = readme["README"].read_text()
    assert readme["filled"](text) == text, "run: python docs/readme.py"


def test_links_of_the_readme_lead_somewhere() -> None:
    root = DOCS.parent
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (root / "README.md").read_text())
    assert targets
    missing = sorted({target for target in targets if not (root / target).exists()})
    assert not missing
