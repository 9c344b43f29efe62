"""The piecewise-linear stream and its metrics; test_regression_table.py says what it shows."""

from __future__ import annotations

import math

import pytest
import torch

from regard.core.budgets import relative_error
from regard.tasks import (
    PiecewiseRegression,
    Stream,
    evaluate_test_time_regression,
    normalised_error,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_stream_follows_its_equations():
    task = PiecewiseRegression(dim=6, segment=10, length=40, spread=0.3)
    x, y, segment = task.sample(3, generator())
    assert (x.shape, y.shape, segment) == ((3, 40, 6), (3, 40, 6), 10)
    assert torch.allclose(x.norm(dim=-1), torch.full((3, 40), math.sqrt(6.0), dtype=x.dtype))
    for s in range(4):  # one linear map explains a segment, and does not explain the next
        rows = slice(10 * s, 10 * s + 10)
        fitted = torch.linalg.lstsq(x[:, rows], y[:, rows]).solution
        assert relative_error(x[:, rows] @ fitted, y[:, rows]) < 1e-10
        after = slice(10 * (s + 1) % 40, 10 * (s + 1) % 40 + 10)
        assert relative_error(x[:, after] @ fitted, y[:, after]) > 0.5
    centres = x.view(3, 4, 10, 6).mean(2).norm(dim=-1) / math.sqrt(6.0)
    assert (centres > 0.85).all()  # near one another in "cluster"
    iid = PiecewiseRegression(dim=6, segment=10, length=40, mode="iid").sample(3, generator())
    assert (iid.x.view(3, 4, 10, 6).mean(2).norm(dim=-1) / math.sqrt(6.0)).mean() < 0.6


def test_the_scale_of_targets_and_of_noise():
    options = {"dim": 16, "segment": 4, "length": 4000, "mode": "iid"}
    clean = PiecewiseRegression(**options).sample(1, generator())
    noisy = PiecewiseRegression(**options, noise=0.5).sample(1, generator())
    assert torch.equal(clean.x, noisy.x)
    assert clean.y.square().mean() == pytest.approx(1.0, abs=0.05)
    assert (noisy.y - clean.y).std() == pytest.approx(0.5, rel=0.02)


def test_only_the_generator_decides():
    task = PiecewiseRegression(dim=3, segment=4, length=11, noise=0.1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = task.sample(2, generator(5)), task.sample(2, generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.y, two.y)
    assert not torch.equal(one.x, task.sample(2, generator(6)).x)


def test_scores_on_a_stream_done_by_hand():
    y = torch.tensor([[[1.0], [1.0], [2.0], [2.0], [2.0], [2.0]]])
    stream = Stream(torch.zeros(1, 6, 1), y, segment=2)
    last = lambda x, y: torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)  # noqa: E731
    scores = evaluate_test_time_regression(
        {"last": last, "zero": lambda x, y: torch.zeros_like(y)}, stream, baseline="zero"
    )
    size = 3.0  # the mean of y^2
    assert torch.allclose(
        scores["last"].by_position, torch.tensor([1.0, 0, 1, 0, 0, 0]).double() / size
    )
    assert scores["last"].error == pytest.approx(1 / 9)
    assert scores["last"].ratio == pytest.approx(1 / 9)
    assert scores["zero"].error == pytest.approx(1.0)
    assert scores["last"].in_segment.tolist() == pytest.approx([0.5 / size, 0.0])
    assert scores["last"].error == pytest.approx(normalised_error(last(stream.x, y), y))
    alone = evaluate_test_time_regression({"last": last}, stream._replace(segment=6))["last"]
    assert math.isnan(alone.ratio)
    assert alone.in_segment.isnan().all()


@pytest.mark.parametrize("changes", [{"dim": 0}, {"segment": 1.5}, {"length": True}])
def test_sizes_are_checked(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be an int of at least 1"):
        PiecewiseRegression(**({"dim": 2, "segment": 2, "length": 4} | changes))


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="mode must be one of 'cluster', 'iid', got 'clusters'"):
        PiecewiseRegression(2, 2, 4, mode="clusters")
    with pytest.raises(ValueError, match="noise must be a number of at least 0"):
        PiecewiseRegression(2, 2, 4, noise=-1.0)
    with pytest.raises(ValueError, match="sample: batch must be an int of at least 0, got -1"):
        PiecewiseRegression(2, 2, 4).sample(-1, generator())
    stream = PiecewiseRegression(2, 2, 4).sample(1, generator())
    with pytest.raises(ValueError, match=r"predictors\['short'\]\(x, y\) must be a tensor \[1, 4"):
        evaluate_test_time_regression({"short": lambda x, y: y[:, 1:]}, stream)
    with pytest.raises(ValueError, match="baseline must be one of 'a', got 'b'"):
        evaluate_test_time_regression({"a": lambda x, y: y}, stream, baseline="b")
