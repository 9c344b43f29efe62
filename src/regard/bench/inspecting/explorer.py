"""Linked views of a vision model's heads: choose one, and everything shows that one."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.bench.inspecting.gathering import Answers, Explored
from regard.lens.compact import coarse_grid
from regard.lens.importance import kendall

Array = NDArray[np.float64]
CLASSES = 48  # shown of a model's classes; the others are one
SCRIPTS = ("core", "heads", "patterns", "pictures", "matrix", "answers", "export")


def explorer(found: Explored) -> str:
    """A part of a page, with its script and data: no server, no network. At most one per page.

    Nine views: a matrix of heads, two metrics against each other, strength by distance, a map and
    a gallery of patterns, the pictures, attention over a picture, the answers without heads, and
    the whole matrix of weights. What is chosen in one is shown in all, and stands in the address
    of the page.
    """
    # "<" would end the element in which the data stand.
    data = json.dumps(as_data(found), ensure_ascii=False).replace("<", "\\u003c")
    folder = files("regard.bench.inspecting") / "templates"
    read = {
        name: (folder / f"explorer{name}").read_text(encoding="utf-8")
        for name in (".css", ".html", *(f"_{script}.js" for script in SCRIPTS))
    }
    script = "\n".join(read[f"_{name}.js"] for name in SCRIPTS)
    return (
        f'<div class="explorer" id="explorer">\n<style>\n{read[".css"]}</style>\n{read[".html"]}'
        f'<script type="application/json" id="explored">{data}</script>\n'
        f'<script>\n"use strict";\n(() => {{\n{script}\n}})();\n</script>\n</div>'
    )


def as_data(found: Explored) -> dict[str, Any]:
    """What the script reads: large arrays as base64 of bytes or little-endian float32."""
    profile = found.profile
    metrics: dict[str, Array] = {}
    if found.answers is not None:
        metrics |= found.answers.metrics
    metrics["distance"] = profile.mean_attention_distance_patches
    metrics["entropy"] = profile.entropy_nats / np.log(profile.tokens)
    if found.prefix:
        metrics["patches to class"] = profile.patches_to_cls
    if np.isfinite(profile.content_dependence).all():
        metrics["content dependence"] = profile.content_dependence
    agreement = kendall(np.stack([values.ravel() for values in metrics.values()]))
    pictures = [
        {
            "name": picture.name,
            "source": picture.source,
            "label": picture.label,
            "codes": _packed(picture.codes, "u1"),
            "most": _packed(picture.most, "<f4"),
        }
        for picture in found.pictures
    ]
    return {
        "layers": list(found.layers),
        "heads": list(found.heads),
        "grid": list(found.grid),
        "blocks": list(coarse_grid(found.grid, found.factor)),
        "factor": found.factor,
        "prefix": found.prefix,
        "metrics": {name: _short(values) for name, values in metrics.items()},
        "agreement": _short(agreement),
        "profile": _short(profile.strength_mass_k),
        "templates": found.templates.tolist(),
        "pictures": pictures,
        "answers": None if found.answers is None else _answers(found.answers, found.classes),
        "patterns": _patterns(found),
        "notes": found.notes,
    }


def _answers(found: Answers, classes: dict[int, str]) -> dict[str, Any]:
    """Logits of the classes that are ever the answer, then of the likeliest, and of the rest."""
    count = found.whole.shape[-1]
    won = np.bincount(
        np.concatenate(
            [
                part.argmax(-1).ravel()
                for part in (found.whole, found.without, found.without_layer, found.in_order)
            ]
        ),
        minlength=count,
    )
    chance = np.exp(found.whole - found.whole.max(-1, keepdims=True))
    chance = (chance / chance.sum(-1, keepdims=True)).mean(0)
    chosen = np.lexsort((-chance, -won))[:CLASSES]
    chosen = chosen[np.argsort(-chance[chosen], kind="stable")]
    return {
        "classes": [classes.get(int(number), str(number)) for number in chosen],
        "numbers": chosen.tolist(),
        "rest": count - len(chosen),
        "lost": int((won > 0).sum() - (won[chosen] > 0).sum()),
        "whole": _logits(found.whole, chosen),
        "without": _logits(found.without, chosen),
        "withoutLayer": _logits(found.without_layer, chosen),
        "inOrder": _logits(found.in_order, chosen),
        "order": found.order,
        "counts": found.counts,
        "labelled": found.labelled,
    }


def _logits(logits: Array, chosen: NDArray[np.int64]) -> str:
    """Those of the chosen classes, and the logarithm of the sum of the others' exponentials."""
    rest = np.delete(logits, chosen, axis=-1)
    if rest.shape[-1]:
        most = rest.max(-1, keepdims=True)
        rest = most + np.log(np.exp(rest - most).sum(-1, keepdims=True))
    return _packed(np.concatenate([logits[..., chosen], rest], -1), "<f4")


def _patterns(found: Explored) -> dict[str, Any] | None:
    if found.patterns is None or found.places is None or found.small is None:
        return None
    summary = found.patterns
    low, high = summary.embedding.min(0), summary.embedding.max(0)
    unit = (summary.embedding - low) / np.maximum(high - low, 1e-12)
    medoids = found.small[summary.medoids]
    codes = [255 * part / max(float(part.max()), 1e-12) for part in medoids]
    return {
        "points": found.places.tolist(),
        "at": _short(unit),
        "cluster": summary.cluster.tolist(),
        "names": summary.names,
        "fit": _short(summary.fit, 2),
        "medoids": summary.medoids.tolist(),
        "maps": _packed(np.stack(codes).round(), "u1"),
        "size": medoids.shape[-1],
        "silhouette": _short(np.array(summary.silhouette), 2),
    }


def _packed(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(kind)).tobytes()).decode()


def _short(values: Array, digits: int = 4) -> Any:
    if values.ndim:
        return [_short(part, digits) for part in values]
    return float(f"{float(values):.{digits}g}") if np.isfinite(values) else None
