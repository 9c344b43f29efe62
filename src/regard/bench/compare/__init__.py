"""`compare`: which mechanism predicts a series best, and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from regard.bench.compare.result import Result

__all__ = ["compare"]


def compare(
    series: Any,
    *,
    column: str | None = None,
    lags: int = 24,
    horizons: Sequence[int] = (1, 4, 13, 26),
    mechanisms: Sequence[str] | None = None,
    embedding: Literal["relative", "absolute"] = "relative",
    season: int | None = None,
    decay: bool = False,
    cost_lengths: Sequence[int] = (512, 1024, 2048),
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> Result:
    """Compares mechanisms as forecasters of one series, without training.

        forecast(t, h) = op(q = window_t, k = window_j, v = x[j + h],  all j with j + h <= t)

    The last fifth of the rows is the test and the fifth before it chooses parameters; the
    settings of a mechanism are searched on and around the grid of its card's `tune`, one choice
    for all horizons, by the geometric mean of its errors. Windows are `lags` values relative to the
    current one and values are changes (`embedding="relative"`), or both are levels
    ("absolute"); mechanisms with a `key_bias` get a Gaussian kernel. Ridge autoregression sees
    the same windows and the same pairs. See `regard.tasks.series` for how gaps are treated: no
    filled value is ever a target, and nothing after the origin of a forecast enters it.

    Args:
        series: the name of a shipped data set ("co2", "sunspots", "seattle-temps"), the path of
            a CSV file with a header, or a sequence, array or tensor of numbers in time order,
            NaN or None for gaps.
        column: of the CSV file; the first numeric one that does not just count by default.
            One that counts is taken without being asked for only if the file has no other.
        lags: how many past values make a window, D.
        horizons: how many rows ahead to forecast; one regression each.
        mechanisms: names of cards; all that can be used without training by default.
        season: the period of the seasonal baseline; by default the highest peak of the
            autocorrelation before the test stretch. At most the rows of the training stretch
            less the longest horizon.
        decay: also choose, for the mechanisms that take a `log_decay`, after how many rows a
            pair counts half (or that none does): one more parameter, chosen as the others are.
        cost_lengths: sequence lengths at which time and memory are measured, in one fresh
            process per mechanism; () measures nothing.
        seed: of the values in the cost measurement; nothing else is random.
        threads: of torch, while this runs; one by default: the calls are small, and the times of
            one thread are the ones to compare.
        progress: called as progress(what, done, total).

    Precision: forecasts in float32, baselines and errors in float64; the result holds the
    largest deviation of each mechanism from its float64 reference.
    Cost: about (number of settings) causal calls with n / 5 queries and n keys per horizon.
    Choosing looks at the last 3,000 rows before the test at most.
    Source: the statistic behind "within the noise" is that of Diebold and Mariano, Comparing
    predictive accuracy, 1995; the kernel is local linear regression, Fan and Gijbels 1996.
    Limits: one series, equally spaced rows; at least 20 measured values in the test stretch,
    and in four fifths of its rows.
    Raises: ValueError (`SeriesError`) for a series that cannot be used, KeyError for an unknown
    mechanism, ValueError or TypeError for arguments that do not fit.

    >>> import math
    >>> wave = [math.sin(0.3 * t) + 0.3 * math.sin(0.7 * t) for t in range(200)]
    >>> result = compare(
    ...     wave, lags=6, horizons=(1,), mechanisms=["softmax"], cost_lengths=())
    >>> result.rmse("softmax", 1) < result.rmse("last value", 1)
    True
    """
    from regard.bench.compare.comparison import Comparison
    from regard.bench.compare.inputs import as_series

    return Comparison(
        as_series(series, column),
        lags=lags,
        horizons=horizons,
        mechanisms=mechanisms,
        embedding=embedding,
        season=season,
        decay=decay,
        cost_lengths=cost_lengths,
        seed=seed,
        threads=threads,
        progress=progress,
    ).run()
