"""What a mechanism costs: time and peak memory at a few lengths, one fresh process each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.bench.compare.child import SDPA
from regard.bench.compare.tuning import Choice
from regard.bench.measure.process import stream
from regard.tasks.series import Lagged

LENGTHS = (512, 1024, 2048)
TIMEOUT = 300.0


@dataclass(frozen=True)
class Cost:
    """Processor seconds and bytes beyond the start, per length; and torch's in the same process.

    `peak_bytes` is None where the system does not tell.
    """

    name: str
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    sdpa_seconds: tuple[float, ...]
    peak_bytes: tuple[int | None, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time over that of torch SDPA."""
        pairs = zip(self.seconds, self.sdpa_seconds, strict=True)
        return tuple(own / other if other else float("inf") for own, other in pairs)


def measure_cost(
    name: str,
    choice: Choice | None,
    data: Lagged,
    lengths: tuple[int, ...],
    *,
    threads: int,
    seed: int,
) -> Cost:
    """Starts a process, waits for it, and reads what it found; `choice` is None for torch SDPA."""
    description: dict[str, Any] = {
        "mechanism": name,
        "scale": choice.scale if choice else None,
        "options": choice.options if choice else {},
        "series": data.filled.tolist(),
        "lags": data.lags,
        "embedding": data.embedding,
        "key_shift": data.key_shift,
        "key_scale": data.key_scale,
        "lengths": list(lengths),
        "threads": threads,
        "seed": seed,
    }
    (answer,) = stream("regard.bench.compare.child", description, TIMEOUT)
    found = {key: tuple(value) for key, value in answer.items()}
    return Cost(name, **found)


__all__ = ["LENGTHS", "SDPA", "Cost", "measure_cost"]
