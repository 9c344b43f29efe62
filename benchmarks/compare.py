"""Compares all mechanisms on the series that ship with the package, and keeps the errors.

Run: python benchmarks/compare.py   (about a minute). Accuracy only: it does not depend on how busy
the machine is. Times are in the report that `regard compare` writes on your machine.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

import regard
from regard.core.state import write_atomically
from regard.tasks.data import DATA_SETS

RESULTS = Path(__file__).parent / "results" / "compare.json"


def main() -> None:
    """Writes results/compare.json and prints the tables."""
    found = {}
    for name in DATA_SETS:
        result = regard.compare(name, cost_lengths=())
        print(result, end="\n\n")
        found[name] = {
            "series": result.series,
            "method": result.method,
            "rmse": {
                entry.name: {str(score.horizon): score.rmse for score in entry.scores}
                for entry in result.entries
            },
            "settings": {entry.name: entry.settings for entry in result.entries},
            "findings": result.findings,
        }
    versions = {
        "regard": regard.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    content = json.dumps({"versions": versions, "data": found}, indent=1, ensure_ascii=False)
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomically(RESULTS, (content + "\n").encode())


if __name__ == "__main__":
    main()
