"""`speed`: which attention is the fastest on this machine at a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from regard.bench.timing.result import SpeedResult

__all__ = ["speed"]


def speed(
    mechanisms: Sequence[str] | None = None,
    lengths: Sequence[int] = (512, 2048, 8192),
    *,
    heads: int = 4,
    dim: int = 64,
    batch: int = 1,
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    causal: bool = True,
    backward: bool = False,
    threads: int = 1,
    seed: int = 0,
    patience: float | None = 4.0,
    progress: Callable[[str, float, float], None] | None = None,
) -> SpeedResult:
    """Measures mechanisms at several lengths: time, memory, error, and which form ran.

        ratio = time of op(q, k, v) / time of torch's scaled_dot_product_attention(q, k, v)

    q, k, v are normal, [batch, heads, length, dim], and the same for all; other operands are
    drawn from the domain on the mechanism's card, options are those of its first case. Each
    mechanism has a fresh process, in which torch's kernel is timed beside it: on a GPU the one
    that torch chooses, flash and cuDNN, each by its name. What would not fit into memory, cannot
    serve the call or fails is left out with the reason, and the others go on.

    Args:
        mechanisms: names of cards; all by default.
        lengths: T = S of each row.
        heads, dim, batch: the other sizes; there is one key head per query head.
        dtype: of q, k, v.
        device: "cpu" or "cuda", "cuda:1".
        causal: the mask.
        backward: time a forward and a backward pass together, and judge gradients as well.
        threads: of torch. With one, processor time is taken, with more wall time.
        seed: of all values.
        patience: seconds of measuring a row after which no further run is started, so that long
            calls are measured fewer than five times (the row says so), and calls of an estimated
            15 times as long not at all. None: always five runs.
        progress: called as progress(what, done, total).

    Precision: the error of a row is relative, of outputs (and gradients) in `dtype` against the
    float64 reference on the same values; beyond 256 tokens of some queries of one head.
    Cost: about a second per mechanism to start, then at least six calls a length.
    Source: the least of several runs is the estimate of Chen and Revels, Robust benchmarking in
    noisy environments, 2016.
    Limits: T = S; nothing is warmed up but the call itself, so a GPU is measured at its own clock.
    Raises: KeyError for an unknown mechanism, ValueError or TypeError for arguments that do not
    fit.

    >>> import regard
    >>> result = regard.bench.speed(["linear"], lengths=(32,), heads=1, dim=8, patience=0.1)
    >>> result.fastest(32).name
    'linear'
    """
    from regard.bench.timing.benchmark import Benchmark
    from regard.bench.timing.setting import Setting

    lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    setting = Setting(
        lengths=tuple(sorted(set(lengths))),
        heads=heads,
        dim=dim,
        batch=batch,
        dtype=dtype,
        device=device,
        causal=causal,
        backward=backward,
        threads=threads,
        seed=seed,
        patience=patience,
    )
    return Benchmark(setting, mechanisms, progress).run()
