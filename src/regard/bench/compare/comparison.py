"""The whole comparison, step by step, with a result that is valid after every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import regard
from regard.bench.compare import baselines, findings
from regard.bench.compare.cost import LENGTHS, SDPA, measure_cost
from regard.bench.compare.regressor import (
    TAIL,
    forgetting,
    operands,
    predict,
    reference_tail,
    why_unusable,
)
from regard.bench.compare.result import (
    LAST_VALUE,
    LLA,
    RIDGE,
    SEASONAL,
    Entry,
    Forecasts,
    Result,
    Score,
    Slopes,
)
from regard.bench.compare.slopes import local_slopes
from regard.bench.compare.tuning import Choice, calls, grid, tune
from regard.bench.compare.walk import Walk
from regard.core.budgets import relative_error
from regard.core.card import Card
from regard.core.checks import check_choice, check_flag, check_integer, reject
from regard.tasks.dates import uneven
from regard.tasks.series import LEAST_SCORED, Embedding, Lagged, Series, Split, check_series

Progress = Callable[[str, float, float], None]
DTYPE = torch.float32
TUNING_ROWS = 3000
SLOPE_ROWS = 160
OP = "compare"


class Comparison:
    """Checks its arguments when it is made, computes in `run`, and keeps `result` valid.

    `after_entry(result)` is called whenever a forecaster is finished.
    """

    def __init__(
        self,
        series: Series,
        *,
        lags: int = 24,
        horizons: Sequence[int] = (1, 4, 13, 26),
        mechanisms: Sequence[str] | None = None,
        embedding: Embedding = "relative",
        season: int | None = None,
        decay: bool = False,
        cost_lengths: Sequence[int] = LENGTHS,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_integer(OP, "lags", lags)
        check_integer(OP, "seed", seed, least=0)
        check_flag(OP, "decay", decay)
        for name, value in (("season", season), ("threads", threads)):
            if value is not None:
                check_integer(OP, name, value)
        check_choice(OP, "embedding", embedding, ("relative", "absolute"))
        self.horizons = _integers("horizons", horizons, at_least_one=True)
        self.cost_lengths = _integers("cost_lengths", cost_lengths, at_least_one=False)
        self.embedding: Embedding = embedding
        self.lags, self.season, self.seed, self.decay = lags, season, seed, decay
        self.threads = threads or 1
        self.series, self.split = series, Split.fifths(len(series))
        check_series(series, self.split, least_rows(lags, self.horizons))
        longest = self.split.validation - max(self.horizons)
        if season is not None and season > longest:
            accepted = f"from 1 to {longest}, the rows for training less the longest horizon"
            raise reject(OP, "season", accepted, season)
        skipped: dict[str, str] = {}
        self.cards = self._cards(mechanisms, skipped)
        self.result = Result(
            self._about_series(), self._about_method(), skipped=skipped, times=series.times
        )
        self.after_entry: Callable[[Result], None] = lambda result: None
        self._progress = progress or (lambda words, done, total: None)
        self._done = 0.0
        self._total = sum(
            2 * calls(card, len(self.horizons)) + len(self.horizons) + 1 for card in self.cards
        ) + (len(self.cards) + 1) * bool(self.cost_lengths)

    def run(self) -> Result:
        """Everything; an exception (Ctrl-C, too) leaves what was found so far in `result`."""
        with _threads(self.threads):
            data = Lagged.of(
                self.series.values, self.split, lags=self.lags, embedding=self.embedding
            )
            self.result.values = data.filled
            past = data.before_test().latest(TUNING_ROWS)
            rehearsal = self._walks(past, past.split.validation, past.split.test)
            tests = self._walks(data, self.split.test, self.split.rows)
            yardsticks = [
                float(walk.rmse(baselines.last_value(past, walk))) or walk.pairs.scale
                for walk in rehearsal
            ]
            self._baselines(data, past, rehearsal, tests, yardsticks)
            chosen = {
                card.name: choice
                for card in self.cards
                if (choice := self._mechanism(card, rehearsal, tests, yardsticks)) is not None
            }
            self._slopes(data, tests[0], chosen.get(LLA))
            self._costs(data, chosen)
            self.result.findings = findings.findings(self.result)
            self.result.complete = True
        self._progress("done", self._total, self._total)
        return self.result

    def _walks(self, data: Lagged, start: int, stop: int) -> list[Walk]:
        return [Walk.over(data, horizon, start, stop) for horizon in self.horizons]

    def _baselines(
        self,
        data: Lagged,
        past: Lagged,
        rehearsal: Sequence[Walk],
        tests: Sequence[Walk],
        yardsticks: Sequence[float],
    ) -> None:
        for walk in tests:
            self.result.forecasts[walk.horizon] = Forecasts(
                torch.arange(walk.start, walk.stop), walk.truth, walk.scored, {}
            )
        self._add(
            Entry(LAST_VALUE, "baseline"), tests, [baselines.last_value(data, w) for w in tests]
        )
        season = self.season or baselines.find_season(past.filled)
        if season is None:
            self.result.skipped[SEASONAL] = "no season stands out before the test stretch"
        else:
            naive = [baselines.seasonal_naive(data, walk, season) for walk in tests]
            self._add(Entry(SEASONAL, "baseline", {"season": season}), tests, naive)
        start = time.perf_counter()
        try:
            model, validation = baselines.AutoRegression.tuned(rehearsal, yardsticks)
            seconds = time.perf_counter() - start
            forecasts = [walk.forecasts(model.predict(walk)[0]) for walk in tests]
        except RuntimeError:  # torch's LinAlgError
            self.result.skipped[RIDGE] = "values far beyond those before them make it singular"
            return
        entry = Entry(RIDGE, "baseline", {"ridge": model.ridge}, len(baselines.RIDGES), validation)
        entry.seconds = seconds
        self._add(entry, tests, forecasts)

    def _mechanism(
        self,
        card: Card,
        rehearsal: Sequence[Walk],
        tests: Sequence[Walk],
        yardsticks: Sequence[float],
    ) -> Choice | None:
        start = time.perf_counter()
        words = f"{card.name}: choosing among {_settings(card)} settings"
        work = 2 * calls(card, len(self.horizons))
        self._progress(words, self._done, self._total)

        def step(share: float) -> None:
            self._step(words, share * work)

        try:
            choice = tune(card, rehearsal, yardsticks, DTYPE, step)
            entry = Entry(
                card.name,
                "mechanism",
                choice.settings,
                choice.tried,
                choice.validation,
                choice.edges,
            )
            entry.seconds = time.perf_counter() - start
            outputs = []
            for walk in tests:
                self._step(f"{card.name}: walking over the test")
                outputs.append(predict(card, walk, choice.scales, choice.options, DTYPE)[0])
            self._step(f"{card.name}: against the float64 reference")
            entry.form = _form(card, tests[0], choice)
            entry.deviation = max(
                relative_error(
                    own[-TAIL:], reference_tail(card, walk, choice.scales, choice.options)
                )
                for own, walk in zip(outputs, tests, strict=True)
            )
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            self.result.skipped[card.name] = " ".join(str(error).split()) or type(error).__name__
            return None
        forecasts = [w.forecasts(own) for w, own in zip(tests, outputs, strict=True)]
        return choice if self._add(entry, tests, forecasts) else None

    def _add(self, entry: Entry, walks: Sequence[Walk], forecasts: Sequence[Tensor]) -> bool:
        """Scores a forecaster; one whose errors are not finite is skipped, and False returned."""
        errors = [float(walk.rmse(own)) for walk, own in zip(walks, forecasts, strict=True)]
        if not all(map(math.isfinite, errors)):
            self.result.skipped[entry.name] = "its errors on the test stretch are not finite"
            return False
        for walk, own, rmse in zip(walks, forecasts, errors, strict=True):
            everything = self.result.forecasts[walk.horizon].by_name
            everything[entry.name] = own
            last = float(walk.rmse(everything[LAST_VALUE]))
            relative = rmse / last if last else None
            entry.scores.append(Score(walk.horizon, rmse, relative, int(walk.scored.sum())))
        self.result.entries.append(entry)
        self.after_entry(self.result)
        return True

    def _slopes(self, data: Lagged, walk: Walk, choice: Choice | None) -> None:
        ridge = self.result.entry(RIDGE)
        if choice is None or ridge is None:
            return
        rows = torch.linspace(0, len(walk.origins) - 1, min(SLOPE_ROWS, len(walk.origins)))
        rows = rows.round().long()
        slopes = local_slopes(walk, choice)[rows]
        _, everywhere = baselines.AutoRegression(ridge.settings["ridge"]).predict(walk)
        unit = walk.pairs.scale / data.key_scale
        self.result.slopes = Slopes(
            walk.horizon, walk.start + rows, slopes.double() * unit, everywhere[-1] * unit
        )

    def _costs(self, data: Lagged, chosen: dict[str, Choice]) -> None:
        if not self.cost_lengths:
            return
        for name, choice in [(SDPA, None), *chosen.items()]:
            self._step(f"{name}: time and memory in a fresh process")
            try:
                cost = measure_cost(
                    name, choice, data, self.cost_lengths, threads=self.threads, seed=self.seed
                )
            except (OSError, RuntimeError, TypeError, ValueError) as error:
                self.result.skipped[f"cost of {name}"] = " ".join(str(error).split())
            else:
                self.result.costs.append(cost)

    def _step(self, words: str, work: float = 1.0) -> None:
        self._done = min(self._done + work, self._total)
        self._progress(words, self._done, self._total)

    def _cards(self, names: Sequence[str] | None, skipped: dict[str, str]) -> list[Card]:
        gaps = not bool(self.series.observed.all())
        if isinstance(names, str):
            raise reject(OP, "mechanisms", "a sequence of names", names, kind=TypeError)
        if names is not None and not names:
            raise reject(OP, "mechanisms", "at least one name", list(names))
        chosen = [regard.mechanisms[name] for name in dict.fromkeys(names or regard.mechanisms)]
        usable = []
        for card in chosen:
            reason = why_unusable(card, gaps=gaps)
            if reason is None:
                usable.append(forgetting(card) if self.decay else card)
            elif names is not None:
                raise ValueError(f"{OP}: mechanism {card.name!r} cannot take part: {reason}")
            elif card.tune:
                skipped[card.name] = reason
        return usable

    def _about_series(self) -> dict[str, Any]:
        series = self.series
        return {
            "name": series.name,
            "column": series.column,
            "title": series.title,
            "unit": series.unit,
            "step": series.step,
            "source": series.source,
            "licence": series.licence,
            "rows": len(series),
            "gaps": self.split.gaps(series.observed),
            "scored": int(series.observed[self.split.test :].sum()),
            "other_columns": list(series.others),
            "uneven": uneven(series.times),
        }

    def _about_method(self) -> dict[str, Any]:
        split = self.split
        return {
            "regard": regard.__version__,
            "torch": torch.__version__,
            "lags": self.lags,
            "horizons": list(self.horizons),
            "embedding": self.embedding,
            "decay": self.decay,
            "rows_for_choosing": min(split.test, TUNING_ROWS),
            "dtype": str(DTYPE).removeprefix("torch."),
            "seed": self.seed,
            "threads": self.threads,
            "split": {
                "training": split.validation,
                "validation": split.test - split.validation,
                "test": split.rows - split.test,
            },
        }


def least_rows(lags: int, horizons: Sequence[int]) -> int:
    """The shortest series whose training stretch holds twice as many complete pairs as lags,
    and at least 20, and whose test stretch can be scored."""
    training = lags + max(horizons) + max(2 * lags, 20)
    rows = max(training, 5 * LEAST_SCORED)
    while Split.fifths(rows).validation < training:
        rows += 1
    return rows


def _integers(name: str, values: Sequence[int], *, at_least_one: bool) -> tuple[int, ...]:
    if isinstance(values, int):
        values = (values,)
    for value in values:
        check_integer(OP, name, value)
    if at_least_one and not values:
        raise reject(OP, name, "at least one", list(values))
    return tuple(sorted(set(values)))


def _settings(card: Card) -> int:
    scales, combinations = grid(card)
    return len(scales or (1.0,)) * len(combinations)


def _form(card: Card, walk: Walk, choice: Choice) -> str | None:
    """Which form of the op served the test walk, if the op is one that tells."""
    from regard.bench.compare.regressor import arguments

    q, k, v, mask = operands(walk, DTYPE)
    named = arguments(card, k, choice.scales, choice.options)
    if mask is not None:
        named["key_mask"] = mask
    try:
        return regard.explain(card.op, q, k, v, **named).form
    except TypeError:
        return None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
