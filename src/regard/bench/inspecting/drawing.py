"""The pictures of an inspection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regard.bench.report.plotting import Picture, figure, source_of

SHOWN = 64  # rows and columns of a small map
NAMED = 36  # tokens whose names fit beside a map
Array = NDArray[np.floating[Any]]


def matrices(
    name: str,
    values: dict[str, Array],
    layers: Sequence[int],
    heads: Sequence[int],
    caption: str,
) -> Picture:
    """Arrays [layers, heads] side by side, each on a scale from 0."""
    height = 1.2 + max(1.0, 0.17 * len(layers))
    with figure(height, 1, len(values)) as (drawing, axes):
        for axis, (title, array) in zip(axes[0], values.items(), strict=True):
            vmax = max(float(np.nanmax(array)), 1e-9)
            shown = axis.imshow(array, aspect="auto", origin="lower", vmin=0, vmax=vmax)
            axis.grid(False)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("head", fontsize=8)
            axis.set_xticks(range(len(heads)), heads)
            axis.set_yticks(range(len(layers)), layers)
            axis.tick_params(labelsize=6)
            drawing.colorbar(shown, ax=axis).ax.tick_params(labelsize=6)
        axes[0, 0].set_ylabel("layer", fontsize=8)
        source = source_of(drawing)
    words = "; ".join(
        f"{title}: {np.nanmin(v):.3g} to {np.nanmax(v):.3g}" for title, v in values.items()
    )
    return Picture(name, source, f"Per layer and head. {words}.", caption)


def pooled(weights: torch.Tensor) -> Array:
    """Maps [..., T, S] of at most 64 x 64 cells, averaged over what they hold."""
    size = (min(SHOWN, weights.shape[-2]), min(SHOWN, weights.shape[-1]))
    lead = weights.shape[:-2]
    small = torch.nn.functional.adaptive_avg_pool2d(
        weights.float().reshape(-1, 1, *weights.shape[-2:]), size
    )
    return small.reshape(*lead, *size).cpu().numpy()


def small_maps(
    name: str, maps: Array, layers: Sequence[int], heads: Sequence[int], caption: str
) -> Picture:
    """A row of maps per layer, a column per head."""
    count, columns = maps.shape[:2]
    with figure(0.3 + 5.6 * count / columns, count, columns) as (drawing, axes):
        for (row, column), axis in np.ndenumerate(axes):
            axis.imshow(maps[row, column], vmin=0, aspect="auto", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if column == 0:
                axis.set_ylabel(layers[row], fontsize=7)
            if row == 0:
                axis.set_title(heads[column], fontsize=7)
        source = source_of(drawing)
    return Picture(name, source, f"{count} layers of {columns} heads.", caption)


def one_map(
    name: str, values: Array, rows: Sequence[str], columns: Sequence[str], caption: str
) -> Picture:
    """One map with the names of its tokens, where they fit."""
    height = 1.0 + min(5.0, max(1.0, 0.16 * len(values)))
    with figure(height) as (drawing, axes):
        axis = axes[0, 0]
        shown = axis.imshow(values, vmin=0, aspect="auto", interpolation="nearest")
        axis.grid(False)
        if len(columns) <= NAMED:
            axis.set_xticks(range(len(columns)), map(_plain, columns), rotation=90, fontsize=7)
        if len(rows) <= NAMED:
            axis.set_yticks(range(len(rows)), map(_plain, rows), fontsize=7)
        drawing.colorbar(shown, ax=axis)
        source = source_of(drawing)
    return Picture(name, source, f"{len(rows)} rows, {len(columns)} columns.", caption)


def over_image(name: str, pixels: Array, heat: dict[str, Array], caption: str) -> Picture:
    """An image, and maps of its patches laid over it."""
    high, wide = pixels.shape[:2]
    with figure(0.4 + 5.6 / (len(heat) + 1) * high / wide, 1, len(heat) + 1) as (drawing, axes):
        for axis, (title, values) in zip(axes[0], {"input": None, **heat}.items(), strict=True):
            axis.imshow(pixels, extent=(0, wide, high, 0))
            if values is not None:
                axis.imshow(values, extent=(0, wide, high, 0), alpha=0.65, interpolation="bilinear")
            axis.set_title(title, fontsize=9)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        source = source_of(drawing)
    best = {title: np.unravel_index(int(v.argmax()), v.shape) for title, v in heat.items()}
    words = "; ".join(f"{title}: most at patch ({r}, {c})" for title, (r, c) in best.items())
    return Picture(name, source, f"{words}.", caption)


def bars(name: str, values: dict[str, Array], names: Sequence[str], caption: str) -> Picture:
    """Lines over the tokens of a sequence, one above the other."""
    with figure(1.1 + 1.2 * len(values), len(values), 1, sharex=True) as (drawing, axes):
        for axis, (title, array) in zip(axes[:, 0], values.items(), strict=True):
            axis.bar(range(len(array)), array, width=1.0)
            axis.set_ylabel(title, fontsize=8)
            axis.tick_params(labelsize=7)
        if len(names) <= NAMED:
            axes[-1, 0].set_xticks(range(len(names)), map(_plain, names), rotation=90, fontsize=7)
        else:
            step = -(-len(names) // 8)
            axes[-1, 0].set_xticks(range(0, len(names), step), names[::step], fontsize=7)
        source = source_of(drawing)
    return Picture(name, source, f"{len(names)} tokens.", caption)


def _plain(text: str) -> str:
    """Without what matplotlib takes for mathematics."""
    return text.replace("$", "\\$")
