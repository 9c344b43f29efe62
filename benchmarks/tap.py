"""What a tap costs on the forward pass of a pretrained ViT-S: time and memory.

    python benchmarks/tap.py [--batch 8 1] [--rounds 9] [--out benchmarks/results/tap.json]

The ViT-S/14 of `regard.testing.resources` (12 layers, 6 heads, width 384, 257 tokens, sdpa) on
photographs; CPU only, one thread. Time is `time.process_time`: in every round all variants run
one after the other, and the minimum over the rounds counts. Memory is what a forward pass adds
to the peak of a fresh process (after one such pass), with freed memory given back at once; the
ratio is of that plus the model's weights.

Variants: no tap; `read`, a reader that looks at nothing; `sums`, `Reduce()` with what it does
unless told otherwise (entropy and received weight) and distances; `top`, also the 4 keys with
most weight of every query; `all`, also a rollout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from regard.lens.reductions import Reduce
from regard.lens.tap import tap
from regard.testing import resources

VARIANTS = ("none", "read", "sums", "top", "all")
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def build(batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model and a batch of images for it."""
    model, pixels = resources.vit_small()
    images = resources.images("astronaut", "coffee", "chelsea", "rocket")
    one_each = pixels(list(images.values()))
    return model.eval(), one_each.repeat(-(-batch // len(one_each)), 1, 1, 1)[:batch]


def forward(variant: str, model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """CPU seconds of one forward pass, and of the results of its readers."""
    summary = Reduce(
        distance=True,
        top=4 if variant in ("top", "all") else 0,
        rollout=[0] if variant == "all" else None,
    )
    readers: dict[str, Any] = {"none": None, "read": lambda attention: None}
    reader = readers.get(variant, summary)
    with torch.inference_mode(), nullcontext() if reader is None else tap(model, read=reader):
        start = time.process_time()
        model(pixels)
        if reader is summary:
            summary.result()
        if variant == "all":
            summary.rollout()
        return time.process_time() - start


def seconds(model: torch.nn.Module, pixels: torch.Tensor, rounds: int) -> dict[str, float]:
    """Least CPU time of each variant."""
    best = dict.fromkeys(VARIANTS, float("inf"))
    for _ in range(rounds):
        for variant in VARIANTS:
            best[variant] = min(best[variant], forward(variant, model, pixels))
    return best


def added_memory(variant: str, batch: int) -> float:
    """MiB that a forward pass adds to the peak of this process."""
    model, pixels = build(batch)
    forward(variant, model, pixels)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the peak again from here
    forward(variant, model, pixels)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _in_fresh_process(variant: str, batch: int) -> float:
    command = [sys.executable, __file__, "--memory", variant, "--batch", str(batch)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | AT_ONCE
    )
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        print(added_memory(given.memory, given.batch[0]))
        return
    rows = []
    for batch in given.batch:
        model, pixels = build(batch)
        times = seconds(model, pixels, given.rounds)
        weights = sum(p.nbytes for p in model.parameters()) / 2**20
        peaks = {variant: _in_fresh_process(variant, batch) for variant in VARIANTS}
        for variant in VARIANTS:
            row = {
                "batch": batch,
                "tap": variant,
                "cpu_seconds": round(times[variant], 4),
                "time_ratio": round(times[variant] / times["none"], 3),
                "added_mib": round(peaks[variant], 1),
                "memory_ratio": round((weights + peaks[variant]) / (weights + peaks["none"]), 3),
            }
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if given.out:
        about = {"model": "ViT-S/14, 257 tokens, sdpa", "rounds": given.rounds, "threads": 1}
        about |= {"torch": torch.__version__, "machine": platform.machine()}
        given.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
