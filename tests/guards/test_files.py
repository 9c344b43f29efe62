"""Files stay readable, and speak of nothing but the library."""

from __future__ import annotations

import re
from pathlib import Path

from guards.sources import ROOT

FOLDERS = ("src", "tests", "docs", "benchmarks", ".ci")
CODE = {".py", ".c", ".h"}
TEXT = CODE | {".md", ".toml", ".yml", ".txt", ".in", ".html", ".css", ".js", ".json", ".svg", ""}
# Paths of somebody's machine, and words for how the work was organised.
FOREIGN = re.compile(
    r"(?<![\w.:/])/(?:home|root|Users|work|farm|tmp)/\w|\.\./shared|\bissue [A-Z]\b"
    r"|\b(?:fixture|acceptance) sheet\b|\bhelper session\b"
)


def everything() -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file() and path.suffix != ".html"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    cached = {"__pycache__", ".cache"}
    return [p for p in sorted(found) if p.suffix in TEXT and not cached & set(p.parts)]


FILES = everything()


def test_there_are_files() -> None:
    names = {path.name for path in FILES}
    assert {"pyproject.toml", "Makefile", "run", "card.py", "vector.h"} <= names


def test_no_file_is_too_long() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in FILES if p.suffix in CODE}
    assert not {path.relative_to(ROOT): n for path, n in lengths.items() if n > 800}


def test_nothing_but_the_library() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{number} {line[:120]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert not hits


def test_the_pattern_itself() -> None:
    slash = "/"
    for text in (f"see {slash}home/ann/x", f'"{slash}tmp/out.json"', "as issue" + " B says"):
        assert FOREIGN.search(text)
    for text in ("https://example.org/home/x", "tests/tmp/x", "an issue is filed", "/usr/bin/env"):
        assert not FOREIGN.search(text)
