"""In-context regression: the piecewise-linear stream, for models that are trained on it.

A model sees fresh streams only, so what it can learn is not a map but how to regress.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regard.core.checks import check_integer, reject
from regard.tasks.piecewise import PiecewiseRegression, check_prediction
from regard.tasks.task import Sample


@dataclass(frozen=True)
class InContextRegression:
    """Predict y_t from x_t and the pairs before t, on streams of `PiecewiseRegression`.

    A sample's inputs are (x, y), both [B, length, dim], and its target is y: the model itself
    must be strictly causal, taking its queries from x_t and its keys and values from x_j and
    y_j of pairs j < t. `causal=True` with keys and values one shorter than the queries does
    that. `one_stream` puts both into one sequence for models that take only one.

    The experiment is that of Local Linear Attention (arXiv 2510.01450) at sizes that two cores
    train in seconds; the law of the inputs is ours.

    >>> task = InContextRegression(dim=5, segment=32, length=96)
    >>> (x, y), target = task.sample(2, torch.Generator().manual_seed(0))
    >>> x.shape, x.dtype, target is y
    (torch.Size([2, 96, 5]), torch.float32, True)
    """

    dim: int = 5
    segment: int = 32
    length: int = 96
    mode: Literal["cluster", "iid"] = "cluster"
    noise: float = 0.0
    spread: float = 0.5
    last: int = 8
    dtype: torch.dtype = torch.float32
    streams: PiecewiseRegression = field(init=False, repr=False)

    def __post_init__(self) -> None:
        streams = PiecewiseRegression(
            self.dim, self.segment, self.length, self.mode, self.noise, self.spread
        )
        object.__setattr__(self, "streams", streams)
        check_integer("InContextRegression", "last", self.last)
        if self.last > self.segment:
            raise reject("InContextRegression", "last", f"at most {self.segment}", self.last)
        if not self.dtype.is_floating_point:
            raise reject("InContextRegression", "dtype", "of floating point", self.dtype)

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """`batch` fresh streams, drawn in float64 from `generator` only, then rounded."""
        x, y, _ = self.streams.sample(batch, generator)
        x, y = x.to(self.dtype), y.to(self.dtype)
        return Sample((x, y), y)

    @staticmethod
    def one_stream(x: Tensor, y: Tensor) -> Tensor:
        """[B, n, 2 dim]: token t is (x_t, y_{t-1}), so that a causal model may answer y_t.

        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> InContextRegression.one_stream(x, 10 * x).tolist()
        [[[1.0, 0.0], [2.0, 10.0], [3.0, 20.0]]]
        """
        before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        return torch.cat([x, before], 2)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over all positions."""
        check_prediction("prediction", prediction, target)
        return torch.nn.functional.mse_loss(prediction, target)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Mean squared errors: in all, by segment, and in the last `last` positions.

        Not normalised; the mean of y^2 is about 1. "error/end" covers the `last` positions at
        the end of the last whole segment: what has been learnt of a map by then. A segment cut
        off by the end of the stream counts as one of its own.

        >>> task = InContextRegression(dim=1, segment=2, length=4, last=1)
        >>> y = torch.tensor([[[1.0], [2.0], [3.0], [5.0]]])
        >>> task.metrics(y - torch.tensor([[[1.0], [0.0], [2.0], [0.0]]]), y)
        {'error': 1.25, 'error/segment=1': 0.5, 'error/segment=2': 2.0, 'error/end': 0.0}
        """
        check_prediction("prediction", prediction, target)
        errors = (prediction.double() - target.double()).square().mean((0, 2))
        found = {"error": float(errors.mean())}
        for number, part in enumerate(errors.split(self.segment), 1):
            found[f"error/segment={number}"] = float(part.mean())
        end = len(errors) // self.segment * self.segment or len(errors)
        found["error/end"] = float(errors[max(0, end - self.last) : end].mean())
        return found
