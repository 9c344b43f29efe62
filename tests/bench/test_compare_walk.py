"""The comparison leaks nothing: which pairs a forecast sees, and what may change it."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.bench.compare import baselines
from regard.bench.compare.comparison import Comparison
from regard.bench.compare.regressor import HALF_LIVES, forgetting, predict
from regard.bench.compare.tuning import Tried, finer, grid, tune
from regard.bench.compare.walk import Walk
from regard.core.budgets import relative_error
from regard.native import instruction_sets
from regard.tasks.series import Lagged, Series, Split, load_series

NAN = float("nan")
OPTIONS = {"softmax": {}, "local_linear": {"ridge": 0.1}, "linear": {}}


def noisy_wave(rows: int = 260, gaps: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    time = torch.arange(rows).double()
    noise = torch.randn(rows, generator=generator).double()
    wave = torch.sin(time * 0.5) + 0.02 * time + 0.2 * noise
    if gaps:
        wave[[20, 21, 60, 170, rows - 30, rows - 12, rows - 11]] = NAN
    return wave


def walks(values: torch.Tensor, horizon: int, lags: int = 5) -> tuple[Lagged, Walk]:
    split = Split.fifths(len(values))
    data = Lagged.of(values, split, lags=lags)
    return data, Walk.over(data, horizon, split.test, split.rows)


def scales_of(name: str) -> tuple[float, ...] | None:
    return (4.0,) if name != "linear" else None


@pytest.mark.parametrize("horizon", [1, 3, 11])
def test_forecast_sees_exactly_the_complete_pairs(horizon: int) -> None:
    """Against a loop that writes down, forecast by forecast, which pairs are known by then."""
    data, walk = walks(noisy_wave(), horizon)
    out = predict(regard.mechanisms["softmax"], walk, (4.0,), {}, torch.float64)[0]
    scale = 4.0 * data.lags**-0.5
    for at, origin in enumerate(walk.origins.tolist()):
        query = data.keys[origin - data.lags]
        rows = [
            j
            for j in range(data.lags, len(data.filled))
            if j + horizon <= origin and bool(data.observed[j + horizon])
        ]
        keys = data.keys[torch.tensor(rows) - data.lags]
        values = torch.stack([data.filled[j + horizon] - data.filled[j] for j in rows])
        weights = (-0.5 * scale * (query - keys).square().sum(1)).softmax(0)
        expected = data.filled[origin] + weights @ values
        torch.testing.assert_close(walk.forecasts(out)[at], expected, rtol=1e-10, atol=1e-10)
    assert int(walk.visible()[-1]) == len(walk.pairs.values)
    assert int(walk.pairs.horizon + walk.origins[-1]) == len(data.filled) - 1


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_future_never_changes_a_forecast(name: str) -> None:
    values, horizon = noisy_wave(), 4
    _, walk = walks(values, horizon)
    row = int(walk.origins[20])
    changed = values.clone()
    changed[row + 1 :] = 50.0 * torch.randn(len(values) - row - 1).double()
    _, other = walks(changed, horizon)
    card = regard.mechanisms[name]
    before = predict(card, walk, scales_of(name), OPTIONS[name])[0][:21]
    after = predict(card, other, scales_of(name), OPTIONS[name])[0][:21]
    assert torch.equal(before, after)
    assert torch.equal(walk.base[:21], other.base[:21])
    model = baselines.AutoRegression(1.0)
    assert torch.equal(model.predict(walk)[0][:21], model.predict(other)[0][:21])


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_gaps_are_never_scored_and_never_values(name: str) -> None:
    """Whatever stands where nothing was measured: same forecasts, same error."""
    _, walk = walks(noisy_wave(), 3)
    assert not bool(walk.scored.all())
    assert not bool(walk.pairs.real[-50:].all())
    junk = torch.where(walk.pairs.real, walk.pairs.values, 1e6)
    other = Walk(
        **{
            **vars(walk),
            "pairs": type(walk.pairs)(**{**vars(walk.pairs), "values": junk}),
            "truth": torch.where(walk.scored, walk.truth, 1e6),
        }
    )
    card = regard.mechanisms[name]
    one = predict(card, walk, scales_of(name), OPTIONS[name])[0]
    two = predict(card, other, scales_of(name), OPTIONS[name])[0]
    assert torch.equal(one, two)
    assert float(walk.rmse(walk.forecasts(one))) == float(other.rmse(other.forecasts(two)))
    model = baselines.AutoRegression(1.0)
    assert torch.equal(model.predict(walk)[0], model.predict(other)[0])


def test_noise_in_the_test_stretch_changes_no_parameter() -> None:
    values = noisy_wave()
    split = Split.fifths(len(values))
    changed = values.clone()
    noise = 1e3 * torch.randn(split.rows - split.test).double()
    changed[split.test :] = noise
    results = []
    for series in (values, changed):
        made = Comparison(Series("s", series), lags=5, horizons=(1, 4), cost_lengths=(), threads=1)
        results.append(made.run())
    one, two = ({e.name: (e.settings, e.validation, e.tried) for e in r.entries} for r in results)
    assert one == two
    assert {"softmax", "local_linear", "linear", "ridge autoregression"} <= set(one)
    assert results[0].rmse("softmax", 1) != results[1].rmse("softmax", 1)


def test_autoregression_is_least_squares_on_the_visible_pairs() -> None:
    _, walk = walks(noisy_wave(), 3)
    model = baselines.AutoRegression(0.5)
    outputs, slopes = model.predict(walk)
    for at in (0, 17, len(walk.origins) - 1):
        count = int(walk.visible()[at])
        real = walk.pairs.real[:count]
        keys = walk.pairs.keys[:count][real]
        ones = torch.ones(len(keys), 1).double()
        design = torch.cat([keys, ones], 1)
        penalty = torch.diag(torch.tensor([0.5] * keys.shape[1] + [1e-9]).double())
        right = design.T @ walk.pairs.values[:count][real]
        solution = torch.linalg.solve(design.T @ design + penalty, right)
        torch.testing.assert_close(slopes[at], solution[:-1])
        query = torch.cat([walk.queries[at], torch.ones(1).double()])
        torch.testing.assert_close(outputs[at], query @ solution)


def test_seasons() -> None:
    assert baselines.find_season(load_series("seattle-temps").values[:5000]) == 24
    split = Split.fifths(2284)
    data = Lagged.of(load_series("co2").values, split)
    assert baselines.find_season(data.filled[: split.test]) == 52
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    assert baselines.find_season(noise) is None
    walk = Walk.over(data, 60, split.test, split.rows)
    naive = baselines.seasonal_naive(data, walk, 52)
    assert torch.equal(naive, data.filled[split.test - 104 : split.rows - 104])


def test_tuning_tries_the_grid_and_around_it() -> None:
    card = regard.mechanisms["softmax"]
    data, _ = walks(noisy_wave(), 1)
    past = data.before_test()
    rehearsal = [Walk.over(past, h, past.split.validation, past.split.test) for h in (1, 3)]
    yardsticks = [float(walk.rmse(walk.base)) for walk in rehearsal]
    shares: list[float] = []
    choice = tune(card, rehearsal, yardsticks, step=shares.append)
    assert sum(shares) == pytest.approx(1.0)
    scales, _ = grid(card)
    assert scales is not None
    errors = []
    for scale in scales:
        own = [w.rmse(w.forecasts(predict(card, w, (scale,), {})[0])) for w in rehearsal]
        ratio = torch.stack(own) / torch.tensor(yardsticks)
        errors.append(float(ratio.log().mean().exp()))
    assert choice.validation <= min(errors) * (1 + 1e-6)
    assert choice.tried > len(scales)
    end, _ = finer(card, Tried(0.0, max(scales), {}))
    assert end is not None
    assert max(end) == pytest.approx(4 * max(scales))


def test_a_half_life_halves_the_weight_of_a_pair_as_often_as_it_has_passed() -> None:
    data, walk = walks(noisy_wave(gaps=False), 2)
    card = forgetting(regard.mechanisms["softmax"])
    out = predict(card, walk, (4.0,), {"half_life": 10.0}, torch.float64)[0]
    scale = 4.0 * data.lags**-0.5
    ages = torch.arange(len(walk.pairs.values)).double().flip(0)  # of the pairs, at the last origin
    for back in (0, 7):
        keys = walk.pairs.keys[: len(ages) - back]
        weights = -0.5 * scale * (walk.queries[-1 - back] - keys).square().sum(1)
        weights = (weights - math.log(2) * ages[back:] / 10).softmax(0)
        expected = weights @ walk.pairs.values[: len(keys)]
        torch.testing.assert_close(out[-1 - back], expected, rtol=1e-10, atol=1e-10)
    plain = predict(regard.mechanisms["softmax"], walk, (4.0,), {}, torch.float64)[0]
    none = predict(card, walk, (4.0,), {"half_life": None}, torch.float64)[0]
    assert torch.equal(none, plain)


def test_tuning_with_a_half_life() -> None:
    """The grid is that of the card times the half-lives; None among them stays as it is."""
    card = regard.mechanisms["mesa"]
    wider = forgetting(card)
    assert forgetting(regard.mechanisms["parallax"]) is regard.mechanisms["parallax"]
    assert len(grid(wider)[1]) == len(grid(card)[1]) * len(HALF_LIVES)
    _, plain = finer(wider, Tried(0.0, None, {"ridge": 1.0, "half_life": None}))
    assert {one["half_life"] for one in plain} == {None}
    _, around = finer(wider, Tried(0.0, None, {"ridge": 1.0, "half_life": 1024.0}))
    assert sorted({one["half_life"] for one in around}) == [
        256.0,
        512.0,
        1024.0,
        2048.0,
        4096.0,
        16384.0,
    ]
    noise, values = torch.randn(400, generator=torch.Generator().manual_seed(3)).tolist(), [0.0]
    for row in range(1, 400):  # what follows a value changes its sign every 60 rows
        values.append((0.95 if row // 60 % 2 else -0.95) * values[-1] + noise[row])
    series = torch.tensor(values, dtype=torch.float64)
    options = {"lags": 1, "horizons": (1,), "mechanisms": ["mesa"], "cost_lengths": ()}
    options["embedding"] = "absolute"
    without, with_decay = (
        Comparison(Series("s", series), decay=decay, **options).run().entry("mesa")
        for decay in (False, True)
    )
    assert without is not None
    assert with_decay is not None
    assert with_decay.settings["half_life"] < 16
    assert with_decay.validation < 0.6 * without.validation
    assert with_decay.scores[0].rmse < 0.6 * without.scores[0].rmse


def test_deviation_from_the_reference_is_reported() -> None:
    series = Series("s", noisy_wave(gaps=False))
    made = Comparison(
        series, lags=5, horizons=(1,), mechanisms=["local_linear"], cost_lengths=(), threads=1
    )
    entry = made.run().entry("local_linear")
    assert entry is not None
    assert entry.deviation is not None
    assert 0 < entry.deviation < 1e-3
    assert entry.form == ("native" if instruction_sets() else "blockwise")


def test_float32_forecasts_are_those_of_float64() -> None:
    _, walk = walks(noisy_wave(), 2)
    card = regard.mechanisms["local_linear"]
    single = predict(card, walk, (4.0,), {"ridge": 0.1})[0]
    double = predict(card, walk, (4.0,), {"ridge": 0.1}, torch.float64)[0]
    assert relative_error(single, double) < 1e-3
