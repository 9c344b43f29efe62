"""The towers of attention of a model, found by running it once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from regard.bench.inspecting.opening import Opened, attempt
from regard.bench.inspecting.reading import Subject
from regard.lens.tap import Attention, points, tap


@dataclass(frozen=True)
class Group:
    """Layers of attention of one kind in one stack, as they ran."""

    title: str
    kind: Literal["self", "cross"]
    tower: str
    layers: list[int]
    heads: list[int]
    queries: int
    keys: int
    causal: bool
    decoder: bool

    @property
    def where(self) -> dict[str, Any]:
        """The layers, for readers."""
        return {"kind": self.kind, "where": self.tower, "layers": self.layers}

    def place(self, row: Any, column: Any) -> str:
        """What an entry of an array [layers, heads] is about."""
        return f"layer {self.layers[row]} head {self.heads[column]}"


@dataclass(frozen=True)
class Look:
    """Everything that a view needs: the model, its input, its layers, and how to sample."""

    opened: Opened
    subject: Subject
    groups: list[Group]
    answer: Any
    runs: int
    seed: int

    @property
    def model(self) -> Any:
        return self.opened.model


def look_at(
    opened: Opened,
    subject: Subject,
    layers: Collection[int] | None,
    heads: Collection[int] | None,
    runs: int,
    seed: int,
) -> Look:
    """Runs the model once and groups the layers that ran.

    Raises:
        ValueError: the model refuses the input, has no attention whose weights are known, layers
            of windows or of different sizes, or none of the layers or heads asked for.
    """
    model = opened.model
    name = type(model).__name__
    seen: list[Attention] = []

    def read(attention: Attention) -> None:
        if attention.softmax is not None:
            raise ValueError(f"layer {attention.layer} has no weights: {attention.softmax}")
        seen.append(attention)

    opening = tap(model, read=read)
    with opening, torch.inference_mode():
        answer = attempt(f"{name} cannot run on this input", lambda: model(**subject.inputs))
    towers = {point.name: point.tower for point in points(model)}
    found: dict[tuple[str, Literal["self", "cross"]], list[Attention]] = {}
    for attention in seen:
        found.setdefault((towers[attention.name], attention.kind), []).append(attention)
    known = {attention.layer for attention in seen}
    _check("layers", layers, known, name)
    _check("heads", heads, set(range(max(a.q.shape[1] for a in seen))), name)
    groups = []
    for (tower, kind), calls in found.items():
        calls = [call for call in calls if layers is None or call.layer in layers]
        if not calls:
            continue
        sizes = {
            (call.q.shape[0], call.q.shape[1], call.q.shape[2], call.k.shape[2]) for call in calls
        }
        if len(sizes) > 1 or calls[0].q.shape[0] != 1:
            raise ValueError(
                f"{name}: layers {[call.layer for call in calls]} of {tower} have attention of "
                f"{sorted(sizes)} inputs or windows, heads, queries and keys; inspected are layers "
                "of one size without windows (choose with --layers)"
            )
        _, count, queries, keys = sizes.pop()
        title = f"{kind}-attention"
        decoder = bool(subject.written) and queries == len(subject.written)
        decoder = decoder and "encoder" not in tower.rpartition("decoder")[2]
        if len(found) > 1:
            side = "decoder" if decoder else "encoder" if subject.written else tower
            title = f"{side} {title}"
        own = [head for head in range(count) if heads is None or head in heads]
        numbers = [call.layer for call in calls]
        causal = calls[0].causal
        groups.append(Group(title, kind, tower, numbers, own, queries, keys, causal, decoder))
    return Look(opened, subject, groups, answer, runs, seed)


def _check(option: str, wanted: Collection[int] | None, there: set[int], name: str) -> None:
    missing = sorted(set(wanted or ()) - there)
    if missing:
        raise ValueError(
            f"--{option}: {name} has no {option[:-1]} {', '.join(map(str, missing))}; its {option} "
            f"are {min(there)} to {max(there)}"
        )
