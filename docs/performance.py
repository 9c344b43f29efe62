"""Fills the performance pages and a part of regression.md from the files in benchmarks/results.

`{{ kernels cpu }}` is what benchmarks/cpu.py found, one part for every kind of processor there is
a file of; `{{ kernels gpu }}` what benchmarks/gpu.py found; `{{ trained }}` what
benchmarks/train_gpu.py found. Where there is no file yet the page says so. Pictures are made when
the site is built.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regard.bench.kernels import pages
from regard.bench.kernels.pictures import CAPTIONS
from regard.bench.kernels.pictures import pictures as drawn_from

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results"
TRAINED = RESULTS / "regression_gpu.json"
NOT_YET = "*Not measured yet in this version.*\n"
PATTERNS = {"cpu": "cpu_*.json", "gpu": "gpu*.json"}


def results(device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of every file of a device."""
    for path in sorted(RESULTS.glob(PATTERNS[device])):
        result = json.loads(path.read_text())
        alone = path.with_name(path.name.replace("cpu_", "threads_", 1))
        if alone != path and alone.exists():  # they take the place of those of the whole run
            found = json.loads(alone.read_text())
            left = [row for row in result["left_out"] if row["section"] != "threads"]
            result |= {
                "threaded": found["threaded"], "threads alone": found["date"],
                "left_out": [*left, *found["left_out"]],
            }  # fmt: skip
        yield path.stem, result


def filled(markdown: str) -> str:
    """The page with its placeholders replaced."""
    markdown = re.sub(r"\{\{ kernels (\w+) \}\}", lambda match: kernels(match.group(1)), markdown)
    return re.sub(r"\{\{ trained \}\}", lambda match: trained(), markdown)


def kernels(device: str) -> str:
    """Everything about a device: where, what was missed, pictures, tables."""
    parts = []
    for name, result in results(device):
        machine = result["machine"]
        title = machine.get("gpu") or machine.get("processor") or machine["architecture"]
        if device == "cpu":
            title += f", {machine['instruction_sets']['torch']}"
        drawn = [
            f"![{CAPTIONS[picture]}](figures/{name}_{picture}.svg)\n\n*{CAPTIONS[picture]}*\n"
            for picture in drawn_from(result)
        ]
        parts += [
            f"## {title}\n",
            pages.about(result),
            pages.missed(result),
            *drawn,
            pages.sections(result),
        ]
        if "threads alone" in result:
            parts.append(f"Two threads were measured by themselves on {result['threads alone']}.\n")
    return "\n".join(parts) if parts else NOT_YET


def trained() -> str:
    """Tables and pictures of what models learnt on a GPU."""
    if not TRAINED.exists():
        return NOT_YET
    script = runpy.run_path(str(DOCS / "figures/regression_gpu.py"))
    result = json.loads(TRAINED.read_text())
    drawn = [
        f"![{caption}](figures/regression_gpu_{name}.svg)\n\n*{caption}*\n"
        for name, caption in script["CAPTIONS"].items()
    ]
    return "\n".join([script["tables"](result), *drawn])


def pictures() -> dict[str, bytes]:
    """SVG by its place in the site."""
    found = {}
    for device in PATTERNS:
        for name, result in results(device):
            for picture, content in drawn_from(result).items():
                found[f"figures/{name}_{picture}.svg"] = content
    if TRAINED.exists():
        script = runpy.run_path(str(DOCS / "figures/regression_gpu.py"))
        for picture, content in script["draw"](json.loads(TRAINED.read_text())).items():
            found[f"figures/regression_gpu_{picture}.svg"] = content
    return found
