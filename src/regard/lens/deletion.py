"""Is a map faithful? Delete what it calls most important and watch the output get worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.core.checks import reject
from regard.lens.inputs import tensor
from regard.lens.records import Record, drawing

PERCENT = tuple(range(0, 101, 5))


@dataclass(frozen=True)
class Deletion(Record):
    """The output's score when the most salient `percent` of the input are gone.

    area: the mean score along the curve (trapezoid rule): for an error, higher is more faithful.
    """

    percent: np.ndarray
    scores: np.ndarray
    area: float

    def picture(self, path: Any) -> None:
        """The curve."""
        with drawing(path, (5, 3.2)) as axes:
            axes[0, 0].plot(self.percent, self.scores, marker=".")
            axes[0, 0].set(xlabel="deleted input, %", ylabel="score", title=f"mean {self.area:.3g}")


def deletion_curve(
    saliency: Tensor,
    score: Callable[[Tensor], float],
    *,
    percent: Sequence[float] = PERCENT,
) -> Deletion:
    """Scores the output with growing parts of the input deleted, the most salient first.

    saliency: one value per element of the input: the mean of all tokens' normalised maps. score:
    from a mask (1 keep, 0 delete) to a number, such as the word error rate of what is then heard.
    percent: rising, from 0 to 100. Of equal values the earlier goes first.

    >>> found = deletion_curve(torch.tensor([3.0, 1.0]), lambda kept: 2 - float(kept.sum()),
    ...                        percent=(0, 50, 100))
    >>> found.scores.tolist(), found.area
    ([0.0, 1.0, 2.0], 1.0)
    """
    operation = "deletion_curve"
    values = tensor(operation, "saliency", saliency, axes=1, more=True)
    steps = np.asarray(percent, dtype=float)
    if len(steps) < 2 or (np.diff(steps) <= 0).any() or steps[0] < 0 or steps[-1] > 100:
        raise reject(operation, "percent", "two or more rising numbers in 0 ... 100", percent)
    order = values.flatten().argsort(descending=True, stable=True)
    scores = []
    for step in steps:
        kept = torch.ones(values.numel())
        kept[order[: round(values.numel() * step / 100)]] = 0
        scores.append(float(score(kept.reshape(values.shape))))
    curve = np.array(scores)
    area = float(np.trapezoid(curve, steps) / (steps[-1] - steps[0]))
    return Deletion(steps, curve, area)


def deletion_auc(
    saliency: Tensor,
    score: Callable[[Tensor], float],
    *,
    percent: Sequence[float] = PERCENT,
) -> float:
    """The area of `deletion_curve`."""
    return deletion_curve(saliency, score, percent=percent).area


def word_error_rate(
    said: Sequence[str] | str, heard: Sequence[str] | str, *, most: float | None = 100.0
) -> float:
    """Substitutions, deletions and insertions per word that was said, in percent.

    Texts are split at white space. most: a larger rate is cut to this; None leaves it.

    >>> word_error_rate("the old cat sat", "the cat sat")
    25.0
    """
    first = said.split() if isinstance(said, str) else list(said)
    second = heard.split() if isinstance(heard, str) else list(heard)
    if not first:
        raise reject("word_error_rate", "said", "at least one word", said)
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    rate = 100 * row[-1] / len(first)
    return rate if most is None else min(rate, most)
