"""What every head of a model does on one input, or on the pictures of a folder."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from regard.bench.inspecting.drawing import matrices
from regard.bench.inspecting.explorer import explorer
from regard.bench.inspecting.gathering import Explored, answers, gather
from regard.bench.inspecting.groups import Group, Look
from regard.bench.inspecting.result import Section
from regard.bench.inspecting.views import run
from regard.lens.entropy import entropies
from regard.lens.reductions import Reduce


@dataclass
class _Found:
    """Arrays [L, H] by name, and what only images have."""

    shown: dict[str, np.ndarray]
    names: np.ndarray | None = None
    explored: Explored | None = None
    sentences: list[str] = field(default_factory=list)


def head_section(look: Look, group: Group) -> Section:
    """How widely and how far every head looks, and what it is good for."""
    found = _Found({})
    prefix, grid = look.subject.prefix(group.keys), look.subject.grid
    if group.kind == "self" and prefix is not None and grid is not None:
        _on_grid(look, group, grid, prefix, found)
    else:
        entropy = entropies(look.model, look.subject.inputs, **group.where).relative
        found.shown["relative entropy"] = entropy[:, group.heads]
        if group.kind == "self":
            _on_line(look, group, found)
    entropy = found.shown["relative entropy"]
    sentence = _extremes(group, entropy, "sharpest", "most uniform", "relative entropy")
    found.sentences.insert(0, sentence)
    _add_importance(look, group, found)
    tables = []
    if found.names is not None:
        columns = ["layer", *(f"head {head}" for head in group.heads)]
        rows = [
            [str(layer), *(name.replace("_", " ") for name in line)]
            for layer, line in zip(group.layers, found.names, strict=True)
        ]
        tables.append(("The template that each head's map resembles most:", (columns, rows)))
    caption = f"{group.title}: every head."
    picture = matrices("heads", found.shown, group.layers, group.heads, caption)
    numbers = {
        "layers": group.layers,
        "heads": group.heads,
        "patterns": None if found.names is None else found.names.tolist(),
        "profile": None if found.explored is None else found.explored.profile.strength_mass_k,
        **found.shown,
    }
    section = Section(f"Heads: {group.title}", found.sentences, tables, [picture], numbers)
    if found.explored is not None:
        labels = getattr(look.model.config, "id2label", None) or {}
        found.explored.classes = {int(number): str(name) for number, name in labels.items()}
        section.page = explorer(found.explored)
    return section


def _on_grid(look: Look, group: Group, grid: tuple[int, int], prefix: int, found: _Found) -> None:
    explored = found.explored = gather(look, group, grid, prefix)
    found.names, profile = explored.templates, explored.profile
    found.shown["relative entropy"] = profile.entropy_nats / np.log(profile.tokens)
    distance = profile.mean_attention_distance_patches
    found.shown["distance, patches"] = distance
    found.sentences.append(_extremes(group, distance, "most local", "farthest", "patches away"))
    found.sentences += explored.notes


def _on_line(look: Look, group: Group, found: _Found) -> None:
    summary = Reduce(entropy=False, received=False, distance=True)
    run(look, group, summary)
    parts = [part.distance for part in summary.result() if part.distance is not None]
    distance = np.stack([part[group.heads].float().cpu().numpy() for part in parts])
    found.shown["distance, tokens"] = distance
    found.sentences.append(_extremes(group, distance, "most local", "farthest", "tokens away"))


def _add_importance(look: Look, group: Group, found: _Found) -> None:
    """How far the class probabilities move without each head; or why that was not measured."""
    try:
        measured = answers(look, group)
    except ValueError as error:
        reason = str(error).removeprefix("inspect: ")
        found.sentences.append(f"Importance was not measured: {reason}.")
        return
    if found.explored is not None:
        found.explored.answers = measured
    values = measured.metrics["jsd"]
    found.shown["importance, bits"] = values
    best = np.unravel_index(values.argmax(), values.shape)
    found.sentences.append(
        f"Without {group.place(*best)} the class probabilities move most ({values[best]:.3g} bits)."
    )


def _extremes(group: Group, values: np.ndarray, least: str, most: str, unit: str) -> str:
    low = np.unravel_index(np.nanargmin(values), values.shape)
    high = np.unravel_index(np.nanargmax(values), values.shape)
    return (
        f"The {least} is {group.place(*low)} ({values[low]:.2f} {unit}), the {most} "
        f"{group.place(*high)} ({values[high]:.2f})."
    )
