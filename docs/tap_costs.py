"""What taps and edits cost, for docs/tap.md and docs/steering/act.md, from the result files."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
ACT = {
    "act function": ("function", "calibrated"),
    "act released": ("function", "released"),
    "act layer": ("layer", "calibrated"),
}
WHAT = {
    "none": "no tap",
    "read": "a reader that looks at nothing",
    "sums": "`Reduce(distance=True)`: entropy, received weight, distances",
    "top": "the same and `top=4`",
    "all": "the same and `rollout=[0]`",
}


def table() -> str:
    """Time and memory relative to no tap, per batch size."""
    rows = json.loads((RESULTS / "tap.json").read_text())["rows"]
    batches = sorted({row["batch"] for row in rows}, reverse=True)
    lines = [
        "| tap | " + " | ".join(f"time, batch {n} | memory, batch {n}" for n in batches) + " |",
        "| --- |" + " --- | --- |" * len(batches),
    ]
    for variant, what in WHAT.items():
        cells = [what]
        for batch in batches:
            [row] = [row for row in rows if (row["batch"], row["tap"]) == (batch, variant)]
            cells += [f"{row['time_ratio']:.2f}", f"{row['memory_ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def act(name: str) -> str:
    """A ratio to sdpa, by its name in `ACT`."""
    rows = json.loads((RESULTS / "act.json").read_text())["rows"]
    [row] = [row for row in rows if (row["of"], row["variant"]) == ACT[name]]
    return f"{row['ratio']:.1f}"
