"""What the linked views of heads show, gathered picture by picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.bench.inspecting.groups import Group, Look
from regard.bench.inspecting.pictures import as_url, prepared_pictures
from regard.lens.compact import as_bytes, coarse_weights
from regard.lens.curves import gates_without
from regard.lens.importance import changes
from regard.lens.patterns import PatternSample, PatternSummary
from regard.lens.pruning import Pruner
from regard.lens.strength import StrengthAccumulator, StrengthProfile
from regard.lens.tap import Attention, tap

Array = NDArray[np.float64]
WEIGHTS = 9_000_000  # bytes of attention weights in a page
POINTS = 1000  # maps that are clustered
FEWEST = 4  # clusters, where there are maps for them
STEPS = 16  # sets of heads that are taken out together


@dataclass
class Shown:
    """One picture as the views need it: an image, a label, and its weights as bytes.

    `codes [L, H, S, S]` and `most [L, H, S]` are those of `regard.lens.compact.as_bytes`.
    """

    name: str
    source: str
    label: int | None
    codes: NDArray[np.uint8]
    most: NDArray[np.float32]


@dataclass
class Answers:
    """Logits of N pictures: the whole model's, and without heads.

    whole [N, C], without [N, L, H, C], without_layer [N, L, C]; in_order [N, K, C] after the first
    `counts [K]` heads of `order` (places in L and H, the least important first) were taken out.
    metrics: those of `head_importance` [L, H], of the model's own answers where labels are unknown.
    """

    whole: Array
    without: Array
    without_layer: Array
    in_order: Array
    order: list[tuple[int, int]]
    counts: list[int]
    metrics: dict[str, Array]
    labelled: bool


@dataclass
class Explored:
    """Everything of the linked views; `factor` patches by as many make a block of the weights."""

    layers: list[int]
    heads: list[int]
    grid: tuple[int, int]
    prefix: int
    factor: int
    pictures: list[Shown]
    profile: StrengthProfile
    templates: NDArray[np.str_]
    answers: Answers | None = None
    patterns: PatternSummary | None = None
    places: NDArray[np.int64] | None = None
    small: NDArray[np.float32] | None = None
    classes: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fitting_factor(pictures: int, maps: int, grid: tuple[int, int], prefix: int) -> int:
    """The finest blocks of patches with which all weights fit into a page.

    >>> fitting_factor(1, 144, (14, 14), 1), fitting_factor(24, 144, (14, 14), 1)
    (1, 2)
    """
    for factor in range(1, max(grid) + 1):
        tokens = prefix + (-(-grid[0] // factor)) * (-(-grid[1] // factor))
        if pictures * maps * tokens**2 <= WEIGHTS:
            return factor
    return max(grid)


def gather(look: Look, group: Group, grid: tuple[int, int], prefix: int) -> Explored:
    """Runs the model over the pictures of an inspection; the weights of one layer exist at a time.

    Memory: besides what the page holds, sums of the size of one picture's weights, and 1000 maps
    of 32 x 32 for the patterns.
    """
    files = look.subject.pictures
    factor = fitting_factor(len(files), len(group.layers) * len(group.heads), grid, prefix)
    sums = StrengthAccumulator(grid, prefix)
    sample = PatternSample(grid, prefix, most=POINTS, seed=look.seed)
    totals: dict[int, Tensor] = {}
    shown = []
    for number, (inputs, pixels) in enumerate(_each(look)):
        parts: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []

        def read(attention: Attention, number: int = number, parts: list = parts) -> None:
            weights = attention.weights[:, group.heads].float().cpu()
            sums.add(attention.layer, weights)
            totals[attention.layer] = totals.get(attention.layer, 0) + weights[0]
            sample.add(number, group.layers.index(attention.layer), weights[0])
            parts.append(as_bytes(coarse_weights(weights[0], grid, prefix, factor)))

        with tap(look.model, read=read, **group.where), torch.inference_mode():
            look.model(**inputs)
        codes, most = (np.stack(part) for part in zip(*parts, strict=True))
        file = files[number]
        shown.append(Shown(file.path.name, as_url(pixels), file.label, codes, most))
    names = _names(totals, group, grid, prefix)
    found = Explored(group.layers, group.heads, grid, prefix, factor, shown, sums.profile(), names)
    _cluster(sample, found, look.seed)
    return found


def _each(look: Look) -> Iterator[tuple[dict[str, Tensor], NDArray[np.float32]]]:
    own = look.subject.inputs["pixel_values"]
    pictures = prepared_pictures(look.opened, look.subject.pictures, tuple(own.shape))
    for pixels, shown in pictures:
        yield {**look.subject.inputs, "pixel_values": pixels.to(own.device)}, shown


def _names(
    total: dict[int, Tensor], group: Group, grid: tuple[int, int], prefix: int
) -> NDArray[np.str_]:
    """The template that each head's mean map resembles most."""
    from regard.lens.templates import template_scores

    return np.stack([template_scores(total[n], grid, prefix).best() for n in group.layers])


def _cluster(sample: PatternSample, found: Explored, seed: int) -> None:
    count = len(sample.places)
    most = min(10, count // 3)
    try:
        found.patterns = sample.summary(
            clusters=range(min(FEWEST, most), most + 1), width=16, epochs=20, seed=seed
        )
        found.places, found.small = sample.places, sample.small
    except (ImportError, ValueError) as error:
        words = str(error).split(": ", 1)[-1]
        found.notes.append(f"Patterns were not clustered: {words}.")
        return
    if sample.seen > count:
        found.notes.append(f"Patterns are those of {count} of {sample.seen} maps.")


def answers(look: Look, group: Group) -> Answers:
    """What the model answers without each head, without each layer, and without more and more.

    Cost per picture: L H + L + 16 forwards from the lowest changed layer on.

    Raises:
        ValueError: no encoder, no class probabilities, or layers that cannot be pruned.
    """
    logits = getattr(look.answer, "logits", None)
    if group.kind == "cross" or look.subject.written:
        raise ValueError("the model is no encoder")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[-1] < 2:
        raise ValueError("the model gives no class probabilities")
    labels = [picture.label for picture in look.subject.pictures]
    with Pruner(look.model, operation="inspect") as pruner:
        if max(group.layers) >= len(pruner.layers) or max(group.heads) >= pruner.heads:
            raise ValueError("the layers that can be pruned are not those of the tap")
        whole, without, layers, values, known = [], [], [], [], []
        every = [(layer, head) for layer in group.layers for head in group.heads]
        for number, (inputs, _) in enumerate(_inputs(look)):
            answer = pruner.record(inputs)
            label = labels[number] if labels else None
            place = answer.logits.argmax(-1) if label is None else torch.tensor([label])
            parts, more, own = [], [], []
            for layer in group.layers:
                gates = [gates_without([(layer, head)], pruner) for head in group.heads]
                gates.append(gates_without([(layer, head) for head in group.heads], pruner))
                pruned = pruner.run(torch.stack(gates))
                parts.append(pruned.logits[:-1, 0])
                more.append(pruned.logits[-1, 0])
                embedding = None if pruned.embedding is None else pruned.embedding[:-1]
                own.append(
                    changes(answer.logits, pruned.logits[:-1], place, answer.embedding, embedding)
                )
            slopes = _slopes(pruner, place)[0][group.layers][:, group.heads]
            found = {name: np.stack([part[name][:, 0] for part in own]) for name in own[0]}
            values.append(found | {"grad_sensitivity": slopes.abs().cpu().numpy()})
            whole.append(answer.logits[0])
            without.append(torch.stack(parts))
            layers.append(torch.stack(more))
            known.append(label is not None)
        metrics = {name: np.mean([part[name] for part in values], 0) for name in values[0]}
        places = np.argsort(metrics["jsd"].ravel(), kind="stable")
        ordered = [every[place] for place in places]
        counts = sorted({*np.linspace(0, len(every), STEPS + 1).round().astype(int).tolist()})
        in_order = []
        for inputs, _ in _inputs(look):
            pruner.record(inputs)
            in_order.append(
                torch.stack(
                    [
                        pruner.run(gates_without(ordered[:count], pruner)[None]).logits[0, 0]
                        for count in counts
                    ]
                )
            )
    columns = len(group.heads)
    return Answers(
        _stacked(whole),
        _stacked(without),
        _stacked(layers),
        _stacked(in_order),
        [(int(place) // columns, int(place) % columns) for place in places],
        counts,
        metrics,
        all(known),
    )


def _inputs(look: Look) -> Iterator[tuple[dict[str, Tensor], object]]:
    """The inputs of an inspection: of every picture, or the only one."""
    return _each(look) if look.subject.pictures else iter([(look.subject.inputs, None)])


def _slopes(pruner: Pruner, label: Tensor) -> Tensor:
    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, label.to(logits.device))

    return pruner.gradient(loss)


def _stacked(parts: Sequence[Tensor]) -> Array:
    return torch.stack(list(parts)).double().cpu().numpy()
