"""What an inspection found, as sections that can be printed, saved and shown."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regard.bench.measure.plain import as_json
from regard.bench.report.plotting import Picture
from regard.bench.report.words import Table
from regard.core.state import write_atomically
from regard.lens.records import plain

FORMAT = 1


def _short(value: Any) -> Any:
    """Numbers with five significant digits, which is more than pictures show."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@dataclass
class Section:
    """One part of the answer: sentences, tables and pictures, and all numbers behind them.

    `page` is a part of the HTML report that nothing else can show.
    """

    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    page: str = ""


@dataclass
class Inspection:
    """What was found in one model with one input; `about` says which."""

    about: list[str]
    what: tuple[str, ...]
    versions: dict[str, str]
    thumbnail: str = ""
    sections: list[Section] = field(default_factory=list)
    complete: bool = False

    def to_json(self) -> str:
        """All numbers; those that are not finite become null."""
        return as_json(
            {
                "format": FORMAT,
                "complete": self.complete,
                "versions": self.versions,
                "about": self.about,
                "what": list(self.what),
                "sections": {
                    section.title: _short(plain(section.numbers)) for section in self.sections
                },
                "findings": {section.title: section.sentences for section in self.sections},
            }
        )

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()`, whole or not at all."""
        write_atomically(Path(path), (self.to_json() + "\n").encode())

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Writes a self-contained HTML page, whole or not at all."""
        from regard.bench.inspecting.page import render

        write_atomically(Path(path), render(self).encode())
