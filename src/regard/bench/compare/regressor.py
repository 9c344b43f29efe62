"""A card as a regressor at test time: keys are windows, values are what came after them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.bench.compare.walk import Walk
from regard.core.card import Card
from regard.core.patterns import Pattern

TAIL = 16  # rows of the test that are held against the reference
HALF_LIFE = "half_life"
HALF_LIVES = (None, 16.0, 64.0, 256.0, 1024.0)  # rows; None: nothing is forgotten


def why_unusable(card: Card, *, gaps: bool) -> str | None:
    """Why a card cannot take part, in words, or None."""
    if not card.tune:
        return "its card has no `tune`, so it cannot be used without training"
    if card.operands:
        names = ", ".join(operand.name for operand in card.operands)
        return f"it needs {names}, which only training can give"
    if Pattern.CAUSAL_SELF not in card.patterns:
        return "it has no causal form"
    if gaps and not card.accepts("key_mask"):
        return "it takes no key_mask, and the series has gaps"
    return None


def forgetting(card: Card) -> Card:
    """The card with one more parameter to choose, where its op can forget: the number of rows
    after which a pair counts half."""
    if not card.tune or not card.accepts("log_decay"):
        return card
    return replace(card, tune={**card.tune, HALF_LIFE: HALF_LIVES})


def arguments(
    card: Card,
    keys: Float[Tensor, "b 1 s d"],
    scales: Sequence[float] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Keyword arguments of the op, one head per scale.

    `scales` are multiples of the default scale D ** -0.5; None leaves the op its own. With a
    key bias of -scale |k|^2 / 2 the score scale q . k becomes, up to a constant of the query,
    the Gaussian kernel's -scale |q - k|^2 / 2. A half-life becomes a constant `log_decay`.
    """
    default = keys.shape[-1] ** -0.5
    chosen = torch.tensor([default * s for s in scales or (1.0,)], dtype=keys.dtype)
    out = {**options, "causal": True}
    half_life = out.pop(HALF_LIFE, None)
    if half_life is not None:
        out["log_decay"] = keys.new_full(keys.shape[:3], -math.log(2.0) / half_life)
    if scales is not None:
        out["scale"] = chosen
    if card.accepts("key_bias"):
        out["key_bias"] = -0.5 * chosen[:, None] * keys.square().sum(-1)
    return out


def operands(walk: Walk, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q [1, 1, T, D], k [1, 1, S, D], v [1, 1, S, 1] and the mask of pairs that are no gaps."""
    q, k = walk.queries.to(dtype)[None, None], walk.pairs.keys.to(dtype)[None, None]
    v = walk.pairs.values.to(dtype)[None, None, :, None]
    return q, k, v, None if bool(walk.pairs.real.all()) else walk.pairs.real[None]


def predict(
    card: Card,
    walk: Walk,
    scales: Sequence[float] | None,
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "h t"]:
    """Standardised forecasts, one row per scale (one row if `scales` is None)."""
    q, k, v, mask = operands(walk, dtype)
    named = arguments(card, k, scales, options)
    if mask is not None:
        named["key_mask"] = mask
    q = q.expand(1, len(scales or (1.0,)), -1, -1)
    with torch.no_grad():
        return card.op(q=q, k=k, v=v, **named)[0, :, :, 0]


def reference_tail(
    card: Card,
    walk: Walk,
    scales: Sequence[float] | None,
    options: Mapping[str, Any],
    rows: int = TAIL,
) -> Float[Tensor, " t"]:
    """The last `rows` forecasts by the card's reference, in float64."""
    q, k, v, mask = operands(walk, torch.float64)
    named = arguments(card, k, scales, options)
    if mask is not None:
        named["key_mask"] = mask
    with torch.no_grad():
        return card.reference(q[:, :, -rows:], k, v, **named)[0, 0, :, 0]
