"""Runs in a fresh process: the time and the peak memory of one mechanism at a few lengths.

`python -m regard.bench.compare.child` reads a JSON description on standard input and writes
one on standard output. The memory is measured first, then the times, then those of torch's own
attention in the same process, which is what the times are set against.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.bench.compare.regressor import arguments
from regard.bench.measure.clock import Stopwatch
from regard.bench.measure.memory import peak, resident
from regard.tasks.series import lag_windows

SDPA = "torch SDPA"


def keys_of_length(description: dict[str, Any], length: int) -> Tensor:
    """[1, 1, length, D]: the series' own windows, repeated where the series is shorter."""
    filled = torch.tensor(description["series"], dtype=torch.float64)
    windows = lag_windows(filled, description["lags"], description["embedding"])
    keys = (windows - description["key_shift"]) / description["key_scale"]
    rows = torch.arange(length) % len(keys)
    return keys[rows].to(torch.float32)[None, None]


def make_call(description: dict[str, Any], length: int) -> Callable[[], Any]:
    """One causal call with as many values as channels, in the setting the forecasts use."""
    keys = keys_of_length(description, length)
    generator = torch.Generator().manual_seed(description["seed"])
    values = torch.randn(keys.shape, generator=generator)
    if description["mechanism"] == SDPA:
        return lambda: scaled_dot_product_attention(keys, keys, values, is_causal=True)
    import regard

    card = regard.mechanisms[description["mechanism"]]
    scales = None if description["scale"] is None else (description["scale"],)
    named = arguments(card, keys, scales, description["options"])
    return lambda: card.op(q=keys, k=keys, v=values, **named)


def measure(description: dict[str, Any]) -> dict[str, Any]:
    """What `cost.Cost` holds, per length from the shortest to the longest."""
    torch.set_num_threads(description["threads"])
    torch.set_grad_enabled(False)
    lengths = sorted(description["lengths"])
    make_call(description, 64)()  # what is loaded once, at the first call
    memory: list[int | None] = []
    start = resident()
    for length in lengths:
        call = make_call(description, length)
        before = start if start is not None else peak()
        call()
        after = peak()
        memory.append(None if before is None or after is None else max(0, after - before))
    watch = Stopwatch()

    def seconds(mechanism: dict[str, Any], length: int) -> float:
        call = make_call(mechanism, length)
        call()
        return watch.sample(call).seconds

    times = [seconds(description, length) for length in lengths]
    plain = {**description, "mechanism": SDPA}
    return {
        "lengths": lengths,
        "seconds": times,
        "sdpa_seconds": [seconds(plain, length) for length in lengths],
        "peak_bytes": memory,
    }


def main() -> None:
    """Reads, measures, writes."""
    print(json.dumps(measure(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
