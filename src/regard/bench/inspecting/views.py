"""Sinks and maps of a model on one input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regard.bench.inspecting.drawing import (
    bars,
    matrices,
    one_map,
    over_image,
    pooled,
    small_maps,
)
from regard.bench.inspecting.groups import Group, Look
from regard.bench.inspecting.result import Section
from regard.lens.maps import rollout
from regard.lens.sinks import sinks
from regard.lens.tap import Attention, tap

MOST = 6  # tokens in a table
LONGEST = 2048  # tokens of a rollout


def run(look: Look, group: Group, read: Any) -> None:
    """Runs the model with a reader on the layers of a group."""
    with tap(look.model, read=read, **group.where), torch.inference_mode():
        look.model(**look.subject.inputs)


def key_names(look: Look, group: Group) -> list[str]:
    """What the keys of a group are called."""
    return look.subject.names(group.keys, group.decoder and group.kind == "self")


def percent(value: float) -> str:
    """
    >>> percent(0.1234)
    '12.3'
    """
    return f"{100 * value:.1f}"


def sink_section(look: Look, group: Group) -> Section:
    """Which tokens attention collects on."""
    found = sinks(look.model, look.subject.inputs, **group.where)
    received = found.received[:, 0][:, group.heads]
    sink = found.sink[:, 0][:, group.heads]
    names, share = key_names(look, group), received.mean((0, 1))
    order = np.argsort(-share)[:MOST]
    rows = []
    for place in order:
        size = found.largest[:, 0, place] if np.isfinite(found.largest).all() else None
        layer = "" if size is None else f"{size.max():.1f} (layer {group.layers[size.argmax()]})"
        rows.append(
            [
                names[place],
                str(place),
                percent(share[place]),
                f"{sink[..., place].sum()} of {sink[..., place].size}",
                layer,
            ]
        )
    columns = ["token", "position", "attention received, %", "heads where it is a sink"]
    columns += ["largest |x| / rms"]
    first, anywhere = order[0], sink.any((0, 1))
    if anywhere.any():
        sentence = (
            f"{names[first]!r} at position {first} gets {percent(share[first])} % of the attention "
            f"and is a sink in {sink[..., first].sum()} of {sink[..., first].size} heads; "
            f"{anywhere.sum()} of {len(names)} tokens are a sink in some head."
        )
    else:
        sentence = "No token is a sink in any head: attention collects nowhere."
    sentences = [sentence]
    if found.dimensions:
        channels = ", ".join(map(str, found.dimensions))
        sentences.append(f"Channels that mark {names[first]!r}: {channels}.")
    mass = found.mass[:, group.heads]
    caption = f"{group.title}: share of attention that goes to sinks."
    per_layer = {f"layer {n}": received[i].mean(0) for i, n in enumerate(group.layers)}
    ends = {k: per_layer[k] for k in (next(iter(per_layer)), list(per_layer)[-1])}
    pictures = [
        matrices("sinks", {"share to sinks": mass}, group.layers, group.heads, caption),
        bars("received", ends, names, "Attention received per token, mean of heads."),
    ]
    numbers = {
        "layers": group.layers,
        "heads": group.heads,
        "tokens": names,
        "received": received,
        "sink": sink,
        "mass": mass,
        "dimensions": list(found.dimensions),
    }
    title = f"Sinks: {group.title}"
    tables = [("The tokens that get most:", (columns, rows))]
    return Section(title, sentences, tables, pictures, numbers)


def map_section(look: Look, group: Group) -> Section:
    """The weights themselves, and where attention leads through all layers."""
    small, means = [], []
    square = group.kind == "self" and group.queries == group.keys <= LONGEST
    decoder_keys = group.decoder and group.kind == "self"
    keys = group.keys if decoder_keys else look.subject.heard(group.keys)
    queries = keys if square else group.queries

    def read(attention: Attention) -> None:
        weights = attention.weights[0, group.heads]
        small.append(pooled(weights[:, :queries, :keys]))
        if square:
            means.append(attention.weights[0].float().mean(0).cpu())

    run(look, group, read)
    maps = np.stack(small)
    per_cell = "" if maps.shape[-1] == keys else f", {keys / maps.shape[-1]:.1f} keys per cell"
    caption = f"{group.title}: a row per layer, a column per head{per_cell}."
    pictures = [small_maps("maps", maps, group.layers, group.heads, caption)]
    numbers: dict[str, Any] = {"layers": group.layers, "heads": group.heads, "maps": maps}
    row_names = look.subject.names(group.queries, group.decoder)[:queries]
    names = key_names(look, group)[:keys]
    sentences = [
        f"{len(group.layers)} layers, {len(group.heads)} heads, {queries} queries, {keys} keys"
        + (", causal." if group.causal else ".")
    ]
    if square:
        shares = rollout(torch.stack(means)[:, None, None]).shares[0]
        numbers["rollout"] = shares if len(shares) <= 512 else pooled(torch.from_numpy(shares))
        pictures += _rolled(look, group, shares[:queries, :keys], row_names, names)
    elif group.kind == "cross":
        mean = np.mean(small, (0, 1))
        caption = "Mean of all layers and heads."
        if mean.shape[-1] != keys:
            names = [names[int(i * keys / mean.shape[-1])] for i in range(mean.shape[-1])]
        if len(mean) != queries:
            row_names = [row_names[int(i * queries / len(mean))] for i in range(len(mean))]
        pictures.append(one_map("cross", mean, row_names, names, caption))
    return Section(f"Maps: {group.title}", sentences, [], pictures, numbers)


def _rolled(
    look: Look, group: Group, shares: np.ndarray, rows: list[str], columns: list[str]
) -> list[Any]:
    prefix, pixels = look.subject.prefix(group.keys), look.subject.pixels
    if prefix is None or pixels is None or look.subject.grid is None:
        if len(shares) > 128:
            shares = pooled(torch.from_numpy(shares))
            rows = columns = [str(i) for i in range(len(shares))]
        caption = "Rollout: how much of every token (column) arrives where (row)."
        return [one_map("rollout", shares, rows, columns, caption)]
    heat = {"rollout, mean": shares[prefix:, prefix:].mean(0).reshape(look.subject.grid)}
    if prefix:
        heat = {"rollout to class": shares[0, prefix:].reshape(look.subject.grid), **heat}
    caption = "How much of every patch arrives after all layers: at the class token, and anywhere."
    return [over_image("rollout", pixels, heat, caption)]
