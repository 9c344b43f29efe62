"""The examples in docstrings and in the README run."""

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


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    if not README.exists():
        pytest.skip("there is no README yet")
    return re.findall(rf"^```(?:{language})\n(.*?)^```", README.read_text(), re.M | re.S)


def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks("python|py")
    assert found
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(found, 1):  # a block may use what an earlier one defined
        exec(compile(block, f"README.md, python block {number}", "exec"), names)


def test_commands_of_the_readme_exist() -> None:
    lines = "".join(blocks("sh|bash|console|shell")).splitlines()
    used = {tuple(line.strip().removeprefix("$ ").split()[:2]) for line in lines if line}
    makefile = (ROOT / "Makefile").read_text()
    for program, target in (pair for pair in used if len(pair) == 2):
        if program == "make":
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"no make {target}"
        if program == "regard" and not target.startswith("-"):
            assert CliRunner().invoke(app, [target, "--help"]).exit_code == 0, f"no regard {target}"
    assert ("make", "test") in used
    assert ("make", "demo") in used
