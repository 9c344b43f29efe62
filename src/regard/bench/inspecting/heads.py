"""What every head of a model does on one input."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from regard.bench.inspecting.drawing import matrices
from regard.bench.inspecting.explorer import explorer
from regard.bench.inspecting.groups import Group, Look
from regard.bench.inspecting.result import Section
from regard.bench.inspecting.views import run
from regard.lens.curves import gates_without
from regard.lens.entropy import entropies
from regard.lens.importance import changes
from regard.lens.pruning import Pruner
from regard.lens.reductions import Reduce
from regard.lens.strength import StrengthAccumulator
from regard.lens.tap import Attention
from regard.lens.templates import template_scores


@dataclass
class _Found:
    """Arrays [L, H] by name, and what only images and only classifiers have."""

    shown: dict[str, np.ndarray]
    names: np.ndarray | None = None
    profile: np.ndarray | None = None
    heat: np.ndarray | None = None
    whole: np.ndarray | None = None
    without: np.ndarray | None = None
    sentences: list[str] = field(default_factory=list)


def head_section(look: Look, group: Group) -> Section:
    """How widely and how far every head looks, and what it is good for."""
    entropy = entropies(look.model, look.subject.inputs, **group.where).relative[:, group.heads]
    found = _Found({"relative entropy": entropy})
    found.sentences.append(
        _extremes(group, entropy, "sharpest", "most uniform", "relative entropy")
    )
    prefix, grid = look.subject.prefix(group.keys), look.subject.grid
    if group.kind == "self" and prefix is not None and grid is not None:
        _on_grid(look, group, grid, prefix, found)
    elif group.kind == "self":
        _on_line(look, group, found)
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
        "profile": found.profile,
        **found.shown,
    }
    section = Section(f"Heads: {group.title}", found.sentences, tables, [picture], numbers)
    if found.heat is not None and found.profile is not None:
        labels = getattr(look.model.config, "id2label", None) or {}
        count = 0 if found.whole is None else len(found.whole)
        section.page = explorer(
            picture=look.subject.thumbnail,
            layers=group.layers,
            heads=group.heads,
            metrics=dict(reversed(found.shown.items())),
            profile=found.profile,
            heat=found.heat,
            query="from the class token" if prefix else "on average over patches",
            whole=found.whole,
            without=found.without,
            classes=[str(labels.get(number, number)) for number in range(count)],
        )
    return section


def _on_grid(look: Look, group: Group, grid: tuple[int, int], prefix: int, found: _Found) -> None:
    sums, names, heat = StrengthAccumulator(grid, prefix), [], []

    def read(attention: Attention) -> None:
        weights = attention.weights[:, group.heads].float().cpu()
        sums.add(attention.layer, weights)
        names.append(template_scores(weights[0], grid, prefix).best())
        rows = weights[0, :, 0] if prefix else weights[0].mean(1)
        heat.append(rows[:, prefix:].unflatten(-1, grid).numpy())

    run(look, group, read)
    profile = sums.profile()
    found.names, found.heat = np.stack(names), np.stack(heat)
    found.profile = profile.strength_mass_k
    distance = profile.mean_attention_distance_patches
    found.shown["distance, patches"] = distance
    found.sentences.append(_extremes(group, distance, "most local", "farthest", "patches away"))


def _on_line(look: Look, group: Group, found: _Found) -> None:
    summary = Reduce(entropy=False, received=False, distance=True)
    run(look, group, summary)
    parts = [part.distance for part in summary.result() if part.distance is not None]
    distance = np.stack([part[group.heads].float().cpu().numpy() for part in parts])
    found.shown["distance, tokens"] = distance
    found.sentences.append(_extremes(group, distance, "most local", "farthest", "tokens away"))


def _add_importance(look: Look, group: Group, found: _Found) -> None:
    """The class probabilities without each head; or a sentence why there are none."""
    try:
        whole, pruned = _pruned(look, group)
    except ValueError as error:
        reason = str(error).removeprefix("inspect: ")
        found.sentences.append(f"Importance was not measured: {reason}.")
        return
    values = changes(whole, pruned, whole.argmax(-1))["jsd"][..., 0]
    found.whole = whole[0].double().softmax(-1).cpu().numpy()
    found.without = pruned[:, :, 0].double().softmax(-1).cpu().numpy()
    found.shown["importance, bits"] = values
    best = np.unravel_index(values.argmax(), values.shape)
    found.sentences.append(
        f"Without {group.place(*best)} the class probabilities move most ({values[best]:.3g} bits)."
    )


def _pruned(look: Look, group: Group) -> tuple[Tensor, Tensor]:
    """Logits [1, C] of the model, and [L, H, 1, C] without each head of a group."""
    logits = getattr(look.answer, "logits", None)
    if group.kind == "cross" or look.subject.written:
        raise ValueError("the model is no encoder")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[-1] < 2:
        raise ValueError("the model gives no class probabilities")
    with Pruner(look.model, operation="inspect") as pruner, torch.inference_mode():
        if max(group.layers) >= len(pruner.layers) or max(group.heads) >= pruner.heads:
            raise ValueError("the layers that can be pruned are not those of the tap")
        whole = pruner.record(look.subject.inputs).logits
        found = []
        for layer in group.layers:
            gates = torch.stack([gates_without([(layer, head)], pruner) for head in group.heads])
            found.append(pruner.run(gates).logits)
    return whole, torch.stack(found)


def _extremes(group: Group, values: np.ndarray, least: str, most: str, unit: str) -> str:
    low = np.unravel_index(np.nanargmin(values), values.shape)
    high = np.unravel_index(np.nanargmax(values), values.shape)
    return (
        f"The {least} is {group.place(*low)} ({values[low]:.2f} {unit}), the {most} "
        f"{group.place(*high)} ({values[high]:.2f})."
    )
