"""Test-time regression on a stream whose linear map changes every segment.

Each segment has a map A of its own, and the target is y = A x. A predictor sees the pairs
before t and the input x_t, and predicts y_t; nothing is trained. In mode "cluster" the inputs
of a segment lie in a region of their own, so that near keys are keys of the right segment; in
mode "iid" they lie anywhere, and only recency tells segments apart. A comparison should report
both: locality helps in one and cannot in the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.tasks.task import check_draw

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(x [B, n, d], y [B, n, d]) -> predictions [B, n, d], row t from pairs before t and x_t only."""


class Stream(NamedTuple):
    """Inputs and targets [B, n, d], and the length of a segment."""

    x: Float[Tensor, "b n d"]
    y: Float[Tensor, "b n d"]
    segment: int


@dataclass(frozen=True)
class PiecewiseRegression:
    """Streams of `length` pairs of dimension `dim`, with a new linear map every `segment`.

        c_s = normalise(N(0, I)),   A_s = N(0, 1)^{dim x dim} / sqrt(dim)
        x_t = sqrt(dim) normalise(c_s + spread N(0, I) / sqrt(dim))      mode "cluster"
        x_t = sqrt(dim) normalise(N(0, I))                               mode "iid"
        y_t = A_s x_t + noise N(0, I)

    All |x_t| are sqrt(dim): with keys of different lengths a softmax of x . x_j would favour
    the long ones. The piecewise-linear stream is that of the experiments of Local Linear
    Attention (arXiv 2510.01450); the law of the inputs is ours.

    >>> task = PiecewiseRegression(dim=4, segment=8, length=20)
    >>> stream = task.sample(2, torch.Generator().manual_seed(0))
    >>> stream.x.shape, stream.y.dtype
    (torch.Size([2, 20, 4]), torch.float64)
    """

    dim: int
    segment: int
    length: int
    mode: Literal["cluster", "iid"] = "cluster"
    noise: float = 0.0
    spread: float = 0.5

    def __post_init__(self) -> None:
        for name in ("dim", "segment", "length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"PiecewiseRegression: {name} must be an int of at least 1, got {value!r}"
                )
        if self.mode not in ("cluster", "iid"):
            raise ValueError(
                f"PiecewiseRegression: mode must be one of 'cluster', 'iid', got {self.mode!r}"
            )
        for name in ("noise", "spread"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"PiecewiseRegression: {name} must be a number of at least 0, got {value!r}"
                )

    def sample(self, batch: int, generator: torch.Generator) -> Stream:
        """`batch` independent streams, in float64, on the generator's device.

        Only `generator` is drawn from, in the order centres, maps, inputs, noise.
        """
        check_draw("PiecewiseRegression.sample", batch, generator)

        def normal(*shape: int) -> Tensor:
            return torch.randn(
                *shape, dtype=torch.float64, device=generator.device, generator=generator
            )

        d, n = self.dim, self.length
        segments = -(-n // self.segment)
        of = torch.arange(n, device=generator.device) // self.segment  # token -> segment
        centres = _unit(normal(batch, segments, d))
        maps = normal(batch, segments, d, d) / math.sqrt(d)
        x = normal(batch, n, d)
        if self.mode == "cluster":
            x = centres[:, of] + self.spread * x / math.sqrt(d)
        x = math.sqrt(d) * _unit(x)
        y = (maps[:, of] @ x[..., None])[..., 0]
        if self.noise:
            y = y + self.noise * normal(batch, n, d)
        return Stream(x, y, self.segment)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class RegressionScore(NamedTuple):
    """How well one predictor did; all errors are squared errors over the mean of y^2.

    error: over all positions; by_position [n]; in_segment [segment]: by position inside a
    segment, over the whole segments after the first (NaN if there is none); ratio: the sum of
    errors over that of the baseline (NaN without one).
    """

    error: float
    by_position: Float[Tensor, " n"]
    in_segment: Float[Tensor, " segment"]
    ratio: float


def normalised_error(prediction: Tensor, target: Tensor) -> float:
    """mean (prediction - target)^2 / mean target^2, in float64: predicting 0 gives 1.

    >>> normalised_error(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.2
    """
    check_prediction("prediction", prediction, target)
    difference = prediction.double() - target.double()
    return float(difference.square().mean() / target.double().square().mean())


def evaluate_test_time_regression(
    predictors: Mapping[str, Predictor], stream: Stream, baseline: str | None = None
) -> dict[str, RegressionScore]:
    """The score of every predictor on one stream; `baseline` names the one ratios refer to.

    A predictor must be strictly causal, as `strictly_causal(op)` is. Where no pair has been
    seen it should predict 0. Its errors at the start of segments dominate the sums: look at
    `in_segment` too.
    """
    if baseline is not None and baseline not in predictors:
        raise ValueError(
            "evaluate_test_time_regression: baseline must be one of "
            f"{', '.join(map(repr, predictors))}, got {baseline!r}"
        )
    x, y, segment = stream
    size = y.double().square().mean()
    by_position = {}
    for name, predict in predictors.items():
        with torch.no_grad():
            prediction = predict(x, y)
        check_prediction(f"predictors[{name!r}](x, y)", prediction, y)
        errors = (prediction.double() - y.double()).square().mean((0, 2)) / size
        by_position[name] = errors
    base = math.nan if baseline is None else float(by_position[baseline].sum())
    return {
        name: RegressionScore(
            float(errors.mean()), errors, _in_segment(errors, segment), float(errors.sum()) / base
        )
        for name, errors in by_position.items()
    }


def _in_segment(errors: Tensor, segment: int) -> Tensor:
    whole = len(errors) // segment
    later = errors[segment : whole * segment]
    if later.numel() == 0:
        return errors.new_full((segment,), math.nan)
    return later.view(-1, segment).mean(0)


def check_prediction(name: str, prediction: Any, target: Tensor) -> None:
    """`prediction` is a tensor of the target's shape."""
    if not isinstance(prediction, Tensor) or prediction.shape != target.shape:
        got = list(prediction.shape) if isinstance(prediction, Tensor) else repr(prediction)
        raise ValueError(f"{name} must be a tensor {list(target.shape)}, got {got}")


def strictly_causal(op: Callable[..., Tensor], **options: Any) -> Predictor:
    """An op of (q, k, v) as a predictor: query x_t, keys x_j and values y_j of pairs j < t.

    Keys and values are one shorter than the queries, and `causal=True` aligns them at the end:
    the query of row t stands at pair t - 1, and row 0 sees none and predicts 0.
    """

    def predict(x: Tensor, y: Tensor) -> Tensor:
        q, k, v = x[:, None], x[:, None, :-1], y[:, None, :-1]
        return op(q, k, v, causal=True, **options)[:, 0]

    return predict
