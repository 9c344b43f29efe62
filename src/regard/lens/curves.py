"""Taking out several heads at once: pruning curves, and heads that stand in for each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.lens.importance import METRICS, changes, labelled
from regard.lens.pruning import Ablation, Batch, Pruner
from regard.lens.records import Record, drawing

Head = tuple[int, int]


@dataclass(frozen=True)
class PruningCurve(Record):
    """Accuracy and mean loss after the first `removed` heads of `order` were taken out.

    `accuracy` and `loss` have the length of `removed`; the first point is the whole model if 0 is
    among them. `order [n, 2]` holds (layer, head).
    """

    order: NDArray[np.int64]
    removed: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]

    def area(self) -> float:
        """Mean accuracy over the range of removed heads (trapezoids)."""
        width = float(self.removed[-1] - self.removed[0])
        return float(np.trapezoid(self.accuracy, self.removed)) / width if width else float("nan")

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Accuracy and loss against the number of heads taken out."""
        with drawing(path, (7.0, 2.8), 1, 2) as axes:
            for axis, name in zip(axes.flat, ("accuracy", "loss"), strict=True):
                axis.plot(self.removed, getattr(self, name), marker=".")
                axis.set_xlabel("heads taken out")
                axis.set_ylabel(name)


def pruning_curve(
    model: nn.Module,
    images: Batch | Iterable[tuple[Batch, Tensor]],
    labels: Int[Tensor, " n"] | None = None,
    *,
    order: Sequence[Head],
    removed: Sequence[int] | None = None,
    ablation: Ablation = "zero",
    readout: Callable[[Any], Tensor] | None = None,
    head: str | None = None,
) -> PruningCurve:
    """Accuracy and loss as heads are taken out one after the other in a given order.

    Args:
        model, images, labels, ablation, readout, head: as in `head_importance`.
        order: (layer, head), for instance `importance.order("loss_increase")` (the least important
            first) or its reverse.
        removed: after how many heads to measure; default after each, from none to all of `order`.

    Cost: one forward per point, from the lowest pruned layer on.

    Raises:
        ValueError: a head that does not exist or comes twice, a number beyond the order.
    """
    operation = "pruning_curve"
    batches = labelled(images, labels, operation)
    pruner = Pruner(model, readout=readout, head=head, ablation=ablation, operation=operation)
    order = checked_heads(order, pruner, operation)
    counts = list(range(len(order) + 1)) if removed is None else sorted(set(removed))
    if not counts or counts[0] < 0 or counts[-1] > len(order):
        raise ValueError(f"{operation}: removed must be from 0 to {len(order)}, got {counts}")
    right, lost = np.zeros(len(counts)), np.zeros(len(counts))
    total = 0
    with pruner:
        if ablation == "mean":
            batches = list(batches)
            pruner.learn_means(batch for batch, _ in batches)
        for batch, label in batches:
            pruner.record(batch)
            total += len(label)
            for place, count in enumerate(counts):
                logits = pruner.run(gates_without(order[:count], pruner)[None]).logits[0]
                answer = logits.double().log_softmax(-1)
                own = answer.gather(-1, label.to(answer.device)[:, None])
                right[place] += int((logits.argmax(-1).cpu() == label.cpu()).sum())
                lost[place] -= float(own.sum())
    if not total:
        raise ValueError(f"{operation}: there are no images")
    places = np.array(order, dtype=np.int64).reshape(-1, 2)
    return PruningCurve(places, np.array(counts), right / total, lost / total)


def interaction(
    model: nn.Module,
    images: Batch | Iterable[tuple[Batch, Tensor]],
    labels: Int[Tensor, " n"] | None = None,
    *,
    pairs: Sequence[tuple[Head, Head]],
    metric: str = "loss_increase",
    ablation: Ablation = "zero",
    readout: Callable[[Any], Tensor] | None = None,
    head: str | None = None,
) -> NDArray[np.float64]:
    """I(a, b) = drop(a and b) - drop(a) - drop(b) for pairs of heads, [P].

    Above 0: each stands in for the other, and losing both costs more than the sum. Below 0: they
    do one thing together, and losing one loses most of it. `drop` is the mean over images of a
    metric of `head_importance` (not the gradient).

    Raises:
        ValueError: an unknown metric, a head that does not exist, a pair of one head.
    """
    operation = "interaction"
    accepted = [name for name in METRICS if name != "grad_sensitivity"]
    if metric not in accepted:
        raise ValueError(f"{operation}: metric must be one of {accepted}, got {metric!r}")
    batches = labelled(images, labels, operation)
    pruner = Pruner(model, readout=readout, head=head, ablation=ablation, operation=operation)
    pairs = [tuple(checked_heads(pair, pruner, operation)) for pair in pairs]  # type: ignore[misc]
    singles = list(dict.fromkeys(one for pair in pairs for one in pair))
    wanted: list[tuple[Head, ...]] = [*((one,) for one in singles), *pairs]
    sums, total = np.zeros(len(wanted)), 0
    with pruner:
        if ablation == "mean":
            batches = list(batches)
            pruner.learn_means(batch for batch, _ in batches)
        for batch, label in batches:
            whole = pruner.record(batch)
            total += len(label)
            for place, heads in enumerate(wanted):
                pruned = pruner.run(gates_without(heads, pruner)[None])
                found = changes(
                    whole.logits, pruned.logits, label, whole.embedding, pruned.embedding
                )
                if metric not in found:
                    raise ValueError(f"{operation}: {metric} needs head=, the classifier's name")
                sums[place] += found[metric].sum()
    drop = dict(zip(wanted, sums / max(total, 1), strict=True))
    return np.array([drop[pair] - drop[pair[:1]] - drop[pair[1:]] for pair in pairs])


def gates_without(heads: Sequence[Head], pruner: Pruner) -> Tensor:
    """Gates [L, H] with zeros for these heads."""
    device = next(pruner.model.parameters()).device
    gates = torch.ones(len(pruner.layers), pruner.heads, device=device)
    for layer, head in heads:
        gates[layer, head] = 0
    return gates


def checked_heads(heads: Sequence[Head], pruner: Pruner, operation: str) -> list[Head]:
    """The heads as pairs of whole numbers, every one in the model and none twice."""
    found = [(int(layer), int(head)) for layer, head in heads]
    for layer, head in found:
        if not 0 <= layer < len(pruner.layers) or not 0 <= head < pruner.layers[layer].heads:
            raise ValueError(
                f"{operation}: there is no head {head} of layer {layer}; the model has layers 0 to "
                f"{len(pruner.layers) - 1} of {pruner.heads} heads"
            )
    if len(set(found)) < len(found):
        raise ValueError(f"{operation}: a head is named twice in {found}")
    return found
