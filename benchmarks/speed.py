"""Times all mechanisms on this machine, and keeps the numbers with what the machine is.

Run: python benchmarks/speed.py [--device cuda] [--dtype bfloat16]   (a few minutes). Nothing else
should run meanwhile: rows during which the machine was not quiet are marked, and the script says
so. Every row is of at least five runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from regard.bench import speed
from regard.bench.measure.plain import as_json
from regard.core.state import write_atomically

RESULTS = Path(__file__).parent / "results"
LENGTHS = (512, 2048, 8192)


def main() -> None:
    """Writes results/speed_DEVICE.json and prints the tables."""
    parser = argparse.ArgumentParser(description="Times all mechanisms on this machine.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    found = {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        result = speed(
            lengths=LENGTHS,
            device=options.device,
            dtype=options.dtype,
            backward=backward,
            patience=None,
            progress=lambda words, done, total: print(f"{done:3.0f} of {total:.0f}: {words}"),
        )
        print(result, end="\n\n")
        found[name] = json.loads(result.to_json())
    path = RESULTS / f"speed_{options.device.partition(':')[0]}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (as_json(found) + "\n").encode())


if __name__ == "__main__":
    main()
