"""Gains per head for the boost of image tokens, from how much each head looks at the image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.lens.tap import Attention, points, tap
from regard.steer.context import for_keys, watching
from regard.steer.images import ImagePlaces


def head_sensitivity(
    model: nn.Module,
    prompts: Iterable[dict[str, Any]],
    *,
    max_new_tokens: int = 16,
    image: Bool[Tensor, "b t"] | None = None,
    where: str | None = None,
) -> Float[Tensor, "l h"]:
    """How much the heads of the language model look at the image while they write.

    The weight of a generated token's query on the image's tokens, averaged over tokens and
    prompts; rows are layers 0, 1, ... For `head_gains`.

    Args:
        model: of transformers, with `generate`.
        prompts: inputs of one or several prompts each, padded on the left.
        image: as in `visual_boost`, where all prompts have the same.

    Raises: ValueError without prompts or where layers differ in heads.
    """
    places = ImagePlaces(model, image, "head_sensitivity")
    where = language_part(model, where)
    sums: dict[int, Tensor] = {}
    count = 0
    marks: list[Tensor] = []

    def look(attention: Attention) -> None:
        B, _, T, _ = attention.q.shape
        if attention.offset == 0:
            marks[:] = [places.prompt(T, B)]
        last = attention.weights_of(rows=range(T - 1, T))[:, :, 0].double()
        mass = (last * for_keys(marks[0], attention)[:, None]).sum((0, 2))
        sums[attention.layer] = sums.get(attention.layer, 0) + mass

    generator: Any = model
    with (
        torch.no_grad(),
        watching(model, places.watch),
        tap(model, read=look, kind="self", where=where),
    ):
        for inputs in prompts:
            ids = inputs["input_ids"]
            # All of one length: the end of a text would weigh prompts unequally.
            text = generator.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
            )
            count += len(ids) * (text.shape[1] - ids.shape[1])
    if not count:
        raise ValueError("head_sensitivity: prompts: there are none")
    rows = [sums[layer] for layer in sorted(sums)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("head_sensitivity: model: its layers differ in their number of heads")
    return (torch.stack(rows) / count).float()


def head_gains(
    sensitivity: Float[Tensor, "l h"], mode: Literal["uniform", "weak", "strong"] = "uniform"
) -> Float[Tensor, "l h"]:
    """Gains per head from its attention to the image, with mean 1 in every layer.

    With r = sensitivity / its largest in the layer: "weak" boosts heads that lost the image,
    2 (1 - r) / mean 2 (1 - r); "strong" those that look at it, r / mean r; "uniform" all alike.
    This is our definition: the paper describes a modulation by head without a formula, and the
    released code has none.
    """
    if mode not in ("uniform", "weak", "strong"):
        raise ValueError(f"head_gains: mode {mode!r}: must be 'uniform', 'weak' or 'strong'")
    if mode == "uniform":
        return torch.ones_like(sensitivity)
    r = sensitivity / sensitivity.amax(-1, keepdim=True).clamp_min(1e-12)
    part = r if mode == "strong" else 2 * (1 - r)
    mean = part.mean(-1, keepdim=True)
    return torch.where(mean > 1e-12, part / mean.clamp_min(1e-12), 1.0)


def language_part(model: nn.Module, where: str | None) -> str | None:
    """The part of the paths that tells the language model from the vision tower."""
    if where is None and any("language_model" in point.name for point in points(model)):
        return "language_model"
    return where
