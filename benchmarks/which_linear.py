"""Which linear attention: what each of the family holds, and what it costs, beside softmax.

Run: python benchmarks/which_linear.py [--out FILE]     (a few minutes, one thread)
Writes results/which_linear.json, from which docs/which_linear.md is made.

Per mechanism, 64 channels: the numbers in the state of a head; how many pairs of a random key and
value it recalls without training (regard.bench.capacity); times over torch's causal attention of
the same shape in the same process (four heads, float32, processor time), and the error of that
very call against float64; microseconds for one token after others (eight heads).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regard.bench import capacity
from regard.bench.kernels import family
from regard.bench.kernels.case import Case
from regard.bench.kernels.measure import Bench
from regard.bench.kernels.result import facts
from regard.bench.kernels.rows import Row
from regard.bench.measure.plain import as_json
from regard.core.state import write_atomically

RESULTS = Path(__file__).parent / "results"
LENGTHS = (1024, 4096)
# Mechanism and options; the longer length is timed with its backward pass.
MECHANISMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("softmax", {}),
    ("linear", {}),
    ("relu_linear", {}),
    ("hedgehog", {}),
    ("inline", {}),
    ("lightning", {}),
    ("rat", {"chunk_length": 16}),
    ("delta", {}),
    ("gated_delta", {}),
    ("mesa", {}),
)


def measured(mechanism: str, options: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """The row of one mechanism."""
    row: dict[str, Any] = {
        "mechanism": mechanism,
        "options": options,
        "state": capacity.state_size(mechanism, options=options),
        "pairs": capacity.capacity(mechanism, options=options),
        "recalled_of_64": capacity.recalled(mechanism, 64, options=options),
        "forms": {}, "over_softmax": {}, "wrong": [], "noisy": False,
    }  # fmt: skip
    plain = Case(
        "which", mechanism=mechanism, impl="auto", heads=4, options=options,
        bound=family.BOUND, gradient_bound=family.GRADIENT_BOUND,
    )  # fmt: skip
    if mechanism == "mesa":  # conjugate gradients end at a residual of 1e-4
        plain = replace(plain, bound=1e-4, gradient_bound=1e-3)
    for length, work in zip(LENGTHS, ("forward", "gradients"), strict=True):
        found = bench.row(replace(plain, length=length, work=work))
        if not isinstance(found, Row):
            row["wrong"].append(found.reason)
            continue
        row["forms"][length] = found.form
        row["noisy"] |= found.noisy
        row["error"] = max(v.error for v in found.verdicts)
        row["wrong"] += [f"{v.quantity} {v.error:.1e}" for v in found.verdicts if not v.right]
        row["over_softmax"][f"forward {length}"] = found.numbers["forward/SDPA"]
        if work == "gradients":
            row["over_softmax"][f"both {length}"] = found.numbers["both/SDPA"]
    if mechanism in family.MECHANISMS:
        one = bench.row(replace(plain, heads=8, length=64, work="decode"))
        if isinstance(one, Row):
            row["us"] = one.numbers["us"]
        else:
            row["wrong"].append(one.reason)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "which_linear.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench, result = Bench(rounds=5, attempts=2), {**facts("cpu"), "lengths": LENGTHS, "rows": []}
    for mechanism, of_it in MECHANISMS:
        result["rows"].append(measured(mechanism, of_it, bench))
        print(as_json(result["rows"][-1]), file=sys.stderr, flush=True)
        write_atomically(options.out, (as_json(result) + "\n").encode())
    wrong = [
        f"{row['mechanism']}: {', '.join(row['wrong'])}" for row in result["rows"] if row["wrong"]
    ]
    print("\n".join(wrong) or "no result is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
