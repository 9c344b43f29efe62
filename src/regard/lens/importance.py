"""Which heads a classifier needs: what happens to its answers when each is taken out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regard.lens.pruning import Ablation, Batch, Pruner
from regard.lens.records import Record, drawing

METRICS = (
    "prob_drop",
    "abs_prob_change",
    "acc_drop",
    "jsd",
    "flip_rate",
    "rank_change",
    "cls_cosine_distance",
    "cls_l2",
    "loss_increase",
    "grad_sensitivity",
)
OF_EMBEDDINGS = {"cls_cosine_distance", "cls_l2"}
Unit = Literal["head", "layer", "all_but_head"]
UNITS = ("head", "layer", "all_but_head")


@dataclass(frozen=True)
class HeadImportance(Record):
    """Importance of every head, by several metrics, over a sample of images.

    `metrics[name] [L, H]` is the mean over images, larger is more important; `low` and `high` are
    the ends of its bootstrap interval; `per_image[name] [N, L, H]` is what was averaged. `labels`
    and `predicted` are those of the images, the latter of the whole model. H is 1 for
    `unit="layer"`.
    """

    unit: str
    ablation: str
    confidence: float
    metrics: dict[str, NDArray[np.float64]]
    low: dict[str, NDArray[np.float64]]
    high: dict[str, NDArray[np.float64]]
    per_image: dict[str, NDArray[np.float64]]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def of_class(self, label: int) -> dict[str, NDArray[np.float64]]:
        """The metrics over the images of one class only.

        Raises:
            ValueError: no image has that label.
        """
        chosen = self.labels == label
        if not chosen.any():
            known = sorted(set(self.labels.tolist()))
            raise ValueError(f"of_class: no image has the label {label}; there are {known}")
        return {name: values[chosen].mean(0) for name, values in self.per_image.items()}

    def mean_rank(self, metrics: Sequence[str] | None = None) -> NDArray[np.float64]:
        """Mean over metrics of the rank of each head, 1 = most important; ties share their mean."""
        chosen = self._chosen(metrics)
        shape = self.metrics[chosen[0]].shape
        ranks = [_ranks(-self.metrics[name].ravel()) for name in chosen]
        return np.mean(ranks, 0).reshape(shape)

    def agreement(self, metrics: Sequence[str] | None = None) -> NDArray[np.float64]:
        """Kendall's tau-b between the orders that two metrics give, [M, M]; NaN for a constant."""
        chosen = self._chosen(metrics)
        return kendall(np.stack([self.metrics[name].ravel() for name in chosen]))

    def order(self, metric: str | None = None) -> list[tuple[int, int]]:
        """(layer, head), the least important first; by mean rank if no metric is named."""
        values = self.metrics[metric] if metric is not None else -self.mean_rank()
        places = np.argsort(values.ravel(), kind="stable")
        return [(int(p) // values.shape[1], int(p) % values.shape[1]) for p in places]

    def _chosen(self, metrics: Sequence[str] | None) -> list[str]:
        chosen = list(metrics) if metrics is not None else list(self.metrics)
        unknown = [name for name in chosen if name not in self.metrics]
        if unknown or not chosen:
            raise ValueError(
                f"HeadImportance: metrics must be of {list(self.metrics)}, got {unknown or chosen}"
            )
        return chosen

    def picture(self, path: str | os.PathLike[str]) -> None:
        """One map of layers and heads per metric."""
        columns = min(len(self.metrics), 5)
        rows = -(-len(self.metrics) // columns)
        with drawing(path, (2.3 * columns, 2.6 * rows), rows, columns) as axes:
            for axis in axes.flat[len(self.metrics) :]:
                axis.set_axis_off()
            for axis, (name, values) in zip(axes.flat, self.metrics.items(), strict=False):
                shown = axis.imshow(values, cmap="viridis", aspect="auto", origin="lower")
                axis.set_title(name.replace("_", " "), fontsize=9)
                axis.set_xlabel("head", fontsize=8)
                axis.set_ylabel("layer", fontsize=8)
                axis.tick_params(labelsize=7)
                axis.figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=6)


def head_importance(
    model: nn.Module,
    images: Batch | Iterable[tuple[Batch, Tensor]],
    labels: Int[Tensor, " n"] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    ablation: Ablation = "zero",
    unit: Unit = "head",
    readout: Callable[[Any], Tensor] | None = None,
    head: str | None = None,
    prefix: bool = True,
    copies: int | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> HeadImportance:
    """How much a classifier's answers change when each of its attention heads is taken out.

    With P the class probabilities of an image, P' those without the head, y its label:

        prob_drop        P[y] - P'[y]                    abs_prob_change   |P[y] - P'[y]|
        acc_drop         right - right'                  flip_rate         argmax P != argmax P'
        jsd              (KL(P||M) + KL(P'||M)) / 2 in bits, M = (P + P') / 2
        rank_change      classes above y afterwards minus before
        loss_increase    ln P[y] - ln P'[y]
        cls_cosine_distance, cls_l2    between the embeddings that enter the classifier
        grad_sensitivity |d loss / d gate| at the whole model: a cheap first-order stand-in

    each a mean over images. Only what follows the pruned head is computed, from the output
    projection of its layer on, since what comes before is kept from one run of the whole model; of
    the last block only the tokens that the classifier reads; and the heads of a layer run as copies
    of the batch.

    Args:
        model: an image classifier (or any encoder with logits [B, C]) in evaluation mode.
        images: a batch [N, ...], a mapping of named inputs, or batches (images, labels).
        labels: class indices [N]; with batches they come along.
        metrics: names from above; default all of them (for a model without a module `head`,
            `classifier`, ... name one by `head`, or leave out the two of embeddings).
        ablation: what a pruned head gives: "zero" (its weights are zero), "mean" (its mean over
            these images per token), "uniform" (the mean of the values).
        unit: "head"; "layer" prunes all heads of one; "all_but_head" all others of its layer.
        readout: from what the model returns to logits, if that has no `.logits`.
        head: name of the module that the embedding enters.
        prefix: False recomputes every layer, for comparison: the same numbers.
        copies: heads that run at once; default all of a layer, or as many as a CPU's caches hold.
            With 1, every layer from the pruned one on is computed as by the model itself: numbers
            are the same, bit for bit, as with `prefix=False, copies=1`; else up to rounding.
        resamples: bootstrap samples of images for the intervals.
        confidence: of the intervals.
        seed: of the bootstrap.

    Precision: logits in the model's dtype, probabilities and metrics in float64; on a CPU with
    AVX-512, float32 products by oneDNN unless `copies` is 1. Cost: for each of L H heads somewhat
    less than L / 2 blocks; one backward more for grad_sensitivity. Memory: of L blocks the inputs
    and the heads' outputs for one batch, `copies` times a batch's activations. Source: the visual
    analytics of Li et al., arXiv 2303.13731, rank heads by several pruning-based metrics; the
    definitions here are as written above. Limits: encoders with one self-attention per block.
    Zero ablation takes a model out of what it has seen; compare with "mean".

    Raises:
        ValueError: an unknown metric, ablation or unit, labels that do not fit, a model in
            training mode or without layers, logits or embedding that can be found.
    """
    operation = "head_importance"
    chosen = _metrics(metrics, operation)
    if unit not in UNITS:
        raise ValueError(f"{operation}: unit must be one of {UNITS}, got {unit!r}")
    batches = labelled(images, labels, operation)
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in chosen}
    known, predicted = [], []
    pruner = Pruner(
        model,
        readout=readout,
        head=head,
        ablation=ablation,
        prefix=prefix,
        shortcuts=copies != 1,
        operation=operation,
    )
    with pruner:
        if ablation == "mean":
            batches = list(batches)
            pruner.learn_means(batch for batch, _ in batches)
        for batch, label in batches:
            whole = pruner.record(batch)
            _check_labels(label, whole.logits, operation)
            if whole.embedding is None and OF_EMBEDDINGS & set(chosen):
                raise ValueError(
                    f"{operation}: no module head, classifier, ... of {type(model).__name__} shows "
                    "an embedding: name it by head=, or leave out " + ", ".join(OF_EMBEDDINGS)
                )
            found = []
            for gates in _plan(pruner, unit):
                for rows in gates.split(copies or min(len(gates), pruner.at_once())):
                    pruned = pruner.run(rows)
                    found.append(
                        changes(
                            whole.logits, pruned.logits, label, whole.embedding, pruned.embedding
                        )
                    )
            shape = (len(label), len(pruner.layers), -1)
            for name in chosen:
                if name != "grad_sensitivity":
                    values = np.concatenate([part[name] for part in found])
                    parts[name].append(values.T.reshape(shape))
            if "grad_sensitivity" in chosen:
                parts["grad_sensitivity"].append(_sensitivity(pruner, label, unit))
            known.append(label.cpu().numpy())
            predicted.append(whole.logits.argmax(-1).cpu().numpy())
    if not known:
        raise ValueError(f"{operation}: there are no images")
    per_image = {name: np.concatenate(values) for name, values in parts.items()}
    intervals = {
        name: bootstrap(values, resamples, confidence, seed) for name, values in per_image.items()
    }
    return HeadImportance(
        unit,
        ablation,
        confidence,
        {name: values.mean(0) for name, values in per_image.items()},
        {name: ends[0] for name, ends in intervals.items()},
        {name: ends[1] for name, ends in intervals.items()},
        per_image,
        np.concatenate(known),
        np.concatenate(predicted),
    )


def changes(
    logits: Float[Tensor, "n c"],
    pruned_logits: Float[Tensor, "*g n c"],
    labels: Int[Tensor, " n"],
    embedding: Float[Tensor, "n e"] | None = None,
    pruned_embedding: Float[Tensor, "*g n e"] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """The metrics of `head_importance` per image [*G, N], from answers; no gradients.

    >>> before, after = torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, -50.0]])
    >>> found = changes(before, after, torch.tensor([0]))
    >>> round(float(found["prob_drop"][0]), 3), float(found["rank_change"][0])
    (-0.5, 0.0)
    """
    before, after = logits.detach().double(), pruned_logits.detach().double()
    labels = labels.to(before.device)
    log_p, log_q = functional.log_softmax(before, -1), functional.log_softmax(after, -1)
    at = labels.expand(after.shape[:-1])[..., None]
    own_p = log_p.gather(-1, labels[:, None])[:, 0]
    own_q = log_q.gather(-1, at)[..., 0]
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp_min(torch.finfo(torch.float64).tiny).log()
    divergence = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    first, second = before.argmax(-1), after.argmax(-1)
    found = {
        "prob_drop": own_p.exp() - own_q.exp(),
        "abs_prob_change": (own_p.exp() - own_q.exp()).abs(),
        "acc_drop": (first == labels).double() - (second == labels).double(),
        "jsd": divergence.clamp_min(0) / np.log(2),
        "flip_rate": (first != second).double(),
        "rank_change": (_above(after, at) - _above(before, labels[:, None])).double(),
        "loss_increase": own_p - own_q,
    }
    if embedding is not None and pruned_embedding is not None:
        one, other = embedding.detach().double(), pruned_embedding.detach().double()
        found["cls_cosine_distance"] = 1 - functional.cosine_similarity(
            one.expand_as(other), other, dim=-1
        )
        found["cls_l2"] = (one - other).norm(dim=-1)
    return {name: values.cpu().numpy() for name, values in found.items()}


def _cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(one.expand_as(other), other, dim=-1)


def _above(logits: Tensor, at: Tensor) -> Tensor:
    """Classes that are strictly more probable than the one at `at`."""
    return (logits > logits.gather(-1, at)).sum(-1)


def _plan(pruner: Pruner, unit: str) -> Iterable[Tensor]:
    """Gates [G, L, H] for every layer: one row per thing that is taken out."""
    L, H = len(pruner.layers), pruner.heads
    device = next(pruner.model.parameters()).device
    for number in range(L):
        own = torch.eye(H, device=device)
        rows = {"head": 1 - own, "all_but_head": own, "layer": 0 * own[:1]}[unit]
        gates = torch.ones(len(rows), L, H, device=device)
        gates[:, number] = rows
        yield gates


def _sensitivity(pruner: Pruner, labels: Tensor, unit: str) -> NDArray[np.float64]:
    def loss(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")

    slopes = pruner.gradient(loss).double().cpu().numpy()
    if unit == "layer":
        slopes = slopes.sum(-1, keepdims=True)
    elif unit == "all_but_head":
        slopes = slopes.sum(-1, keepdims=True) - slopes
    return np.abs(slopes)


def bootstrap(
    per_image: NDArray[np.float64],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The percentile interval of the mean of [N, ...] over images drawn with replacement.

    >>> low, high = bootstrap(np.arange(100.0)[:, None])
    >>> bool(low[0] < 49.5 < high[0])
    True
    """
    count = len(per_image)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    means = drawn @ per_image.reshape(count, -1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low.reshape(per_image.shape[1:]), high.reshape(per_image.shape[1:])


def kendall(values: Float[NDArray[np.float64], "m n"]) -> NDArray[np.float64]:
    """Kendall's tau-b of every pair of rows: sum of signs over pairs, ties left out of the norm.

    >>> kendall(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    signs = np.sign(values[:, :, None] - values[:, None, :]).reshape(len(values), -1)
    products = signs @ signs.T
    size = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / np.outer(size, size)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for the smallest; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _metrics(metrics: Sequence[str] | None, operation: str) -> list[str]:
    if isinstance(metrics, str):
        metrics = [metrics]
    chosen = list(METRICS if metrics is None else metrics)
    unknown = [name for name in chosen if name not in METRICS]
    if unknown or not chosen:
        raise ValueError(f"{operation}: metrics must be of {METRICS}, got {unknown or chosen}")
    return chosen


def labelled(
    images: Batch | Iterable[tuple[Batch, Tensor]], labels: Tensor | None, operation: str
) -> Iterable[tuple[Batch, Tensor]]:
    """Batches with their labels, however they were given."""
    if isinstance(images, Tensor) or hasattr(images, "keys"):
        if labels is None:
            raise ValueError(f"{operation}: labels [N] are needed with a batch of images")
        return [(cast(Batch, images), labels)]
    if labels is not None:
        raise ValueError(f"{operation}: batches (images, labels) bring their labels: pass none")
    return cast(Iterable[tuple[Batch, Tensor]], images)


def _check_labels(labels: Tensor, logits: Tensor, operation: str) -> None:
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{operation}: labels must be class indices of the shape ({len(logits)},), got "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"{operation}: labels must be from 0 to {logits.shape[1] - 1}, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
