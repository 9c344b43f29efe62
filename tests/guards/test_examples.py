"""The examples in docstrings, in the README and in the documentation run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guards.sources import ROOT, files, module_name
from regard.cli import app

README = ROOT / "README.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITH_EXAMPLES = [path for path in files() if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", [module_name(path) for path in WITH_EXAMPLES])
def test_doctests(name: str) -> None:
    module = importlib.import_module(name)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=said.append)
    assert runner.tries > 0, "the examples are where doctest does not look"
    assert not runner.failures, "".join(said)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```(?:{language})\n(.*?)^```", page.read_text(), re.M | re.S)


PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python|py")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_the_pages(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python|py"), 1):  # a block may use an earlier one
        exec(compile(block, f"{page.name}, python block {number}", "exec"), names)


def test_the_readme_has_examples() -> None:
    assert README in WITH_PYTHON


def test_commands_of_the_readme_exist() -> None:
    lines = "".join(blocks(README, "sh|bash|console|shell")).splitlines()
    used = {tuple(line.strip().removeprefix("$ ").split()[:2]) for line in lines if line}
    makefile = (ROOT / "Makefile").read_text()
    for program, target in (pair for pair in used if len(pair) == 2):
        if program == "make":
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"no make {target}"
        if program == "regard" and not target.startswith("-"):
            assert CliRunner().invoke(app, [target, "--help"]).exit_code == 0, f"no regard {target}"
    assert ("make", "test") in used
    assert ("make", "demo") in used
