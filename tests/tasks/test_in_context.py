"""In-context regression: what models are given, and how they are judged."""

from __future__ import annotations

import pytest
import torch

from regard.tasks import (
    MQAR,
    GroupWord,
    InContextRegression,
    PiecewiseRegression,
    SwapTracking,
    Task,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_streams_are_those_of_the_untrained_task():
    task = InContextRegression(dim=5, segment=32, length=96)
    (x, y), target = task.sample(3, generator())
    stream = PiecewiseRegression(5, 32, 96).sample(3, generator())
    assert torch.equal(x, stream.x.float())
    assert torch.equal(y, stream.y.float())
    assert target is y
    double = InContextRegression(mode="iid", noise=0.1, dtype=torch.float64)
    noisy = PiecewiseRegression(5, 32, 96, "iid", 0.1).sample(2, generator(4))
    assert torch.equal(double.sample(2, generator(4)).target, noisy.y)


def test_streams_are_fresh_and_decided_by_the_generator():
    task, make = InContextRegression(), generator(3)
    before = torch.get_rng_state()
    one, two = task.sample(2, make), task.sample(2, make)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one.target, two.target)
    assert torch.equal(one.target, task.sample(2, generator(3)).target)


def test_one_stream_never_shows_the_answer():
    task = InContextRegression(dim=2, segment=4, length=8, last=2)
    (x, y), _ = task.sample(2, generator())
    tokens = task.one_stream(x, y)
    assert torch.equal(tokens[:, :, :2], x)
    assert not tokens[:, 0, 2:].any()
    assert torch.equal(tokens[:, 1:, 2:], y[:, :-1])


def test_metrics_and_loss_by_hand():
    task = InContextRegression(dim=1, segment=4, length=10, last=2)  # two and a half segments
    y = torch.randn(2, 10, 1, generator=generator())
    off = torch.arange(10.0)[None, :, None]
    found = task.metrics(y + off, y)
    assert found["error"] == pytest.approx(28.5, rel=1e-6)
    assert [found[f"error/segment={s}"] for s in (1, 2, 3)] == pytest.approx(
        [(0 + 1 + 4 + 9) / 4, (16 + 25 + 36 + 49) / 4, (64 + 81) / 2], rel=1e-6
    )
    assert found["error/end"] == pytest.approx((36 + 49) / 2, rel=1e-6)
    assert float(task.loss(y + off, y)) == pytest.approx(28.5, rel=1e-6)
    short = InContextRegression(dim=1, segment=8, length=5, last=2)
    assert short.metrics(y[:, :5] + off[:, :5], y[:, :5])["error/end"] == pytest.approx(12.5)


def test_it_is_a_task():
    assert isinstance(InContextRegression(), Task)
    assert not isinstance(PiecewiseRegression(1, 1, 1), Task)  # nothing is trained there


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="dim must be an int of at least 1, got 0"):
        InContextRegression(dim=0)
    with pytest.raises(ValueError, match="last must be at most 4, got 8"):
        InContextRegression(segment=4)
    with pytest.raises(ValueError, match="dtype must be of floating point, got torch.int64"):
        InContextRegression(dtype=torch.int64)
    task = InContextRegression()
    for judge in (task.loss, task.metrics):
        with pytest.raises(ValueError, match=r"prediction must be a tensor \[2, 96, 5\]"):
            judge(torch.zeros(2, 95, 5), torch.zeros(2, 96, 5))


@pytest.mark.parametrize(
    "task",
    [
        PiecewiseRegression(2, 2, 4), InContextRegression(), MQAR(), SwapTracking(3, 4),
        GroupWord("Z2", 4),
    ],
    ids=lambda task: type(task).__name__,
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, None])
def test_every_task_says_that_it_wants_a_generator(task, seed):
    with pytest.raises(TypeError, match="sample: generator must be a torch.Generator"):
        task.sample(1, seed)
