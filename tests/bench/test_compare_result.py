"""What a comparison returns: numbers on real data, JSON, sentences, the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import regard
from regard.bench.compare import child, compare
from regard.bench.compare.comparison import Comparison
from regard.bench.compare.cost import SDPA, measure_cost
from regard.bench.compare.findings import findings, loss_difference
from regard.bench.compare.result import LAST_VALUE, RIDGE, Result
from regard.bench.compare.tuning import Choice
from regard.tasks.series import Lagged, Split, load_series


@cache
def sunspots() -> Result:
    return compare("sunspots", horizons=(1, 4), cost_lengths=(128, 256), threads=1)


def test_co2_horizon_one() -> None:
    """Weekly CO2: local linear attention is below softmax and below the last value."""
    result = compare(
        "co2", horizons=(1, 26), mechanisms=["local_linear", "softmax"], cost_lengths=(), threads=1
    )
    for horizon in (1, 26):
        assert result.rmse("local_linear", horizon) < result.rmse("softmax", horizon)
        assert result.rmse("local_linear", horizon) < result.rmse(LAST_VALUE, horizon)
    # Known from independent float64 evaluations of the baselines.
    assert result.rmse(LAST_VALUE, 1) == pytest.approx(0.513, abs=1e-3)
    assert result.rmse(RIDGE, 1) == pytest.approx(0.453, abs=2e-3)
    assert result.rmse("local_linear", 1) < 0.41
    assert result.series["gaps"] == {"training": 58, "validation": 1, "test": 0}
    assert any("against that of ridge autoregression" in sentence for sentence in result.findings)


def test_result_is_complete_and_plain() -> None:
    result = sunspots()
    data = json.loads(result.to_json())
    assert data["complete"] is True
    assert {entry["name"] for entry in data["forecasters"]} >= {
        LAST_VALUE, RIDGE, "softmax", "local_linear", "linear",
    }  # fmt: skip
    forecast = data["forecasts"]["4"]
    assert len(forecast["rows"]) == len(forecast["softmax"]) == len(forecast["truth"]) == 61
    errors = torch.tensor(forecast["softmax"]) - torch.tensor(forecast["truth"])
    assert float(errors.square().mean().sqrt()) == pytest.approx(result.rmse("softmax", 4), 1e-4)
    assert {cost["name"] for cost in data["costs"]} >= {SDPA, "softmax", "local_linear", "linear"}
    for name in ("softmax", LAST_VALUE):
        score = result.entry(name).score(1)  # type: ignore[union-attr]
        assert score is not None
        assert score.relative == pytest.approx(score.rmse / result.rmse(LAST_VALUE, 1))
    assert "Root mean squared error" in str(result)


def test_same_input_same_numbers() -> None:
    again = compare("sunspots", horizons=(1, 4), cost_lengths=(), threads=1)
    first = [(e.name, e.settings, e.scores) for e in sunspots().entries]
    assert first == [(e.name, e.settings, e.scores) for e in again.entries]


def test_findings_name_every_loss() -> None:
    result = sunspots()
    said = " ".join(findings(result))
    losses = [
        (entry.name, score.horizon)
        for entry in result.entries
        for score in entry.scores
        if entry.name != "local_linear" and score.rmse < result.rmse("local_linear", score.horizon)
    ]
    assert losses, "this series is here because LLA loses on it"
    for name, horizon in losses:
        assert re.search(rf"to {name} at horizon [^;]*\b{horizon} \(", said), (name, horizon)
    assert "in cost it loses" in said or result.cost("local_linear").ratios[-1] < 1  # type: ignore[union-attr]


def test_noise_statistic() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(4000, generator=generator).double()
    other = torch.randn(4000, generator=generator).double()
    assert abs(loss_difference(errors, other, 1)) < 3
    assert loss_difference(1.2 * errors, other, 1) > 3
    assert loss_difference(errors, errors, 5) == 0.0


def test_partial_result_is_valid() -> None:
    made = Comparison(load_series("sunspots"), horizons=(1,), cost_lengths=(), threads=1)

    def stop(result: Result) -> None:
        if result.entry(RIDGE):
            raise KeyboardInterrupt

    made.after_entry = stop
    with pytest.raises(KeyboardInterrupt):
        made.run()
    data = json.loads(made.result.to_json())
    assert data["complete"] is False
    assert [entry["name"] for entry in data["forecasters"]][-1] == RIDGE


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lags": 0}, ValueError, "lags must be an int of at least 1"),
        ({"horizons": ()}, ValueError, "horizons must be at least one"),
        ({"horizons": (1.5,)}, TypeError, "horizons must be an int"),
        ({"mechanisms": ["softmx"]}, KeyError, "did you mean 'softmax'"),
        ({"embedding": "relativ"}, ValueError, "embedding must be one of"),
        ({"threads": 0}, ValueError, "threads must be an int of at least 1"),
        ({"mechanisms": "softmax"}, TypeError, "compare: mechanisms must be a sequence of names"),
        ({"season": 162}, ValueError, "compare: season must be from 1 to 161, the rows"),
        ({"lags": 200}, ValueError, "at least"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compare("sunspots", **options)
    with pytest.raises(TypeError, match="series must be a name, a path, or numbers"):
        compare(object())


def periodic(rows: int = 200) -> list[float | None]:
    return [float((3, 1, 4, 1, 5, 9, 2, 6)[row % 8]) for row in range(rows)]


def test_none_is_a_gap() -> None:
    numbers = periodic()
    numbers[0] = numbers[190] = None
    result = compare(
        numbers, lags=3, horizons=(1,), mechanisms=["softmax"], cost_lengths=(), threads=1
    )
    assert result.series["gaps"] == {"training": 1, "validation": 0, "test": 1}
    assert result.series["scored"] == 39
    assert "the last 40 as the test, of which 39 are measured and scored" in str(result)
    assert "(39 points; < is best)" in str(result)
    assert "Least error over 39 scored points" in result.findings[0]
    assert "error vs float64, last 16 rows" in str(result)


def test_errors_of_zero_are_said_in_words() -> None:
    result = compare(
        periodic(), lags=3, horizons=(1, 2), mechanisms=["local_linear"], season=8, cost_lengths=()
    )
    assert result.rmse("seasonal naive", 1) == 0
    said = " ".join(result.findings)
    assert "seasonal naive at horizon 1 (an error of 0) and 2 (an error of 0)." in said
    assert re.search(r"to seasonal naive at horizon 1 \(\S+ against an error of 0", said)
    assert "inf" not in said
    for score in result.entry(RIDGE).scores:  # type: ignore[union-attr]
        score_of_zero = replace(score, rmse=0.0)
        scores = result.entry(RIDGE).scores  # type: ignore[union-attr]
        scores[scores.index(score)] = score_of_zero
    assert re.search(
        rf"that of {RIDGE}: \S+ against 0 at horizon 1, \S+ against 0 at horizon 2\.",
        " ".join(findings(result)),
    )


def test_errors_of_zero_that_are_equal() -> None:
    numbers = [4.0 if row >= 150 else x for row, x in enumerate(periodic())]
    result = compare(
        numbers, lags=3, horizons=(1,), mechanisms=["softmax"], season=8, cost_lengths=()
    )
    assert result.findings[0].endswith(
        "last value at horizon 1 (an error of 0, like seasonal naive)."
    )
    assert re.search(r"last value +0.00 <\n", str(result))
    assert re.search(r"seasonal naive +0.00 <\n", str(result))
    from regard.bench.compare.page import render

    assert "an error of 0, like seasonal naive" in render(result)


def test_forecasts_that_overflow_are_skipped() -> None:
    """What came in the test stretch is beyond float32 after standardisation, but finite."""
    numbers = [x for x in periodic() if x is not None]
    numbers[170:] = [1e60 * x for x in numbers[170:]]
    result = compare(numbers, lags=3, horizons=(1,), mechanisms=["softmax"], cost_lengths=())
    assert "softmax" in result.skipped
    errors = [score.rmse for entry in result.entries for score in entry.scores]
    assert errors
    assert max(errors) < 1e70
    for size in (1e200, 1e-200):
        with pytest.raises(ValueError, match="squares (over|under)flow"):
            compare([size * x for x in periodic() if x is not None], lags=3, horizons=(1,))
    scaled = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    other = scaled.flip(0) * 1.1
    for size in (1e120, 1e-120):
        assert loss_difference(size * scaled, size * other, 2) == pytest.approx(
            loss_difference(scaled, other, 2)
        )


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    compare(
        "sunspots",
        horizons=(1,),
        mechanisms=["linear"],
        cost_lengths=(),
        threads=before + 1,
    )
    assert torch.get_num_threads() == before


def test_cost_in_a_fresh_process() -> None:
    data = Lagged.of(load_series("sunspots").values, Split.fifths(309))
    choice = Choice(4.0, {"ridge": 0.1}, 0.0, 0, ())
    cost = measure_cost("local_linear", choice, data, (128, 512), threads=1, seed=0)
    assert cost.lengths == (128, 512)
    assert 0 < cost.seconds[0] < cost.seconds[1]
    assert all(time > 0 for time in cost.sdpa_seconds)
    with pytest.raises(RuntimeError, match="no mechanism is called 'nothing'"):
        measure_cost("nothing", choice, data, (128,), threads=1, seed=0)


def test_peak_memory_counts_a_square_of_scores() -> None:
    before = child.peak()
    if before is None:
        pytest.skip("this system does not tell the peak memory")
    block = torch.ones(64, 2**20)  # 256 MiB
    after = child.peak()
    assert after is not None
    assert after - (child.resident() or 0) < 2**29
    assert after >= block.numel() * 4


def test_slopes_of_a_linear_series() -> None:
    """Steps that are linear in the two steps before them have one slope everywhere."""
    generator = torch.Generator().manual_seed(0)
    steps = [0.0, 1.0]
    for noise in torch.randn(900, generator=generator):
        steps.append(0.7 * steps[-1] - 0.4 * steps[-2] + float(noise))
    series = torch.tensor(steps).cumsum(0)
    result = compare(
        series, lags=2, horizons=(1,), mechanisms=["local_linear"], cost_lengths=(), threads=1
    )
    slopes = result.slopes
    assert slopes is not None
    assert slopes.slopes.shape == (160, 2)
    # d[t+1] = 0.7 d[t] - 0.4 d[t-1] with d[t] = -k1 and d[t-1] = k1 - k2.
    expected = torch.tensor([-1.1, 0.4]).double()
    torch.testing.assert_close(slopes.autoregression, expected, atol=0.1, rtol=0)
    torch.testing.assert_close(slopes.slopes.mean(0), expected, atol=0.2, rtol=0)


class Page(HTMLParser):
    """Collects what a page refers to, its images' alternative texts, and open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.alts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value for key in ("src", "href") if (value := given.get(key))]
        if tag == "img":
            self.alts.append(given.get("alt") or "")
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_self_contained(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    sunspots().save_report(path)
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.links) == 5
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert all(len(alt) > 20 for alt in page.alts)
    assert 'name="viewport"' in text
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text
    for sentence in sunspots().findings:
        assert sentence.split(" (")[0] in text
    assert "local slopes" in text
    assert len(text) < 2**20
    assert list(tmp_path.iterdir()) == [path]


def test_report_of_an_interrupted_run() -> None:
    from regard.bench.compare.page import render

    made = Comparison(load_series("sunspots"), horizons=(1,), cost_lengths=(), threads=1)
    assert "Interrupted" in render(made.result)


def test_mechanism_that_fails_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.bench.compare import comparison

    def broken(*arguments: object, **options: object) -> Choice:
        raise RuntimeError("out of\npatience")

    monkeypatch.setattr(comparison, "tune", broken)
    result = compare("sunspots", horizons=(1,), mechanisms=["linear"], cost_lengths=(), threads=1)
    assert result.skipped == {"linear": "out of patience"}
    assert result.complete
    assert regard.mechanisms["linear"].name not in [entry.name for entry in result.entries]
