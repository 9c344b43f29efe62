"""What a task that can be trained on is: samples, a loss, metrics."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from regard.core.checks import check_integer, describe, reject

IGNORED = -100
"""The label of positions that count neither in a loss nor in a metric, as in torch."""


class Sample(NamedTuple):
    """A batch: what a model is called with, and what it should answer."""

    inputs: tuple[Tensor, ...]
    target: Tensor

    def to(self, device: str | torch.device) -> Sample:
        """The same batch on another device."""
        return Sample(tuple(x.to(device) for x in self.inputs), self.target.to(device))


@runtime_checkable
class Task(Protocol):
    """Endless fresh data with a loss and metrics; a model answers `model(*sample.inputs)`.

    `sample` draws from the given generator only, so that a seed fixes the data.
    """

    def sample(self, batch: int, generator: torch.Generator) -> Sample:
        """`batch` independent examples, on the generator's device."""
        ...

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What training minimises: a differentiable scalar."""
        ...

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, float]:
        """Numbers to report, by name."""
        ...


def check_draw(op: str, batch: int, generator: torch.Generator) -> None:
    """What every `sample` is given: how many, and where its numbers come from."""
    check_integer(op, "batch", batch, least=0)
    if not isinstance(generator, torch.Generator):
        accepted = "a torch.Generator, such as torch.Generator().manual_seed(0)"
        raise reject(op, "generator", accepted, generator, kind=TypeError)


def cross_entropy(task: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., classes] over the labels that are not `IGNORED`."""
    check_logits(task, prediction, target)
    return torch.nn.functional.cross_entropy(
        prediction.flatten(0, -2), target.flatten(), ignore_index=IGNORED
    )


def answers(task: str, prediction: Any, target: Tensor) -> Tensor:
    """The class at every position: of logits the largest, whole numbers as they are."""
    integers = isinstance(prediction, Tensor) and not prediction.is_floating_point()
    if integers and prediction.shape == target.shape:
        return prediction
    check_logits(task, prediction, target)
    return prediction.argmax(-1)


def check_logits(task: str, prediction: Any, target: Tensor) -> None:
    """`prediction` is a floating-point tensor of the target's shape and one axis of classes."""
    fits = isinstance(prediction, Tensor) and prediction.is_floating_point()
    if not fits or prediction.shape[:-1] != target.shape:
        shape = ", ".join(map(str, target.shape))
        raise ValueError(
            f"{task}: prediction must be logits [{shape}, classes], got {describe(prediction)}"
        )
