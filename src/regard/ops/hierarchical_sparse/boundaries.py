"""Where chunks begin: labels from an attention map, boundaries from scores, and a loss."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from regard.core.checks import check_flag, check_integer, check_number, reject

TINY = 1e-6


def boundary_ratios(
    attention: Float[Tensor, "b l l"],
    *,
    window: int = 4,
    rows: int | None = None,
    smooth_ends: bool = True,
) -> Float[Tensor, "b l"]:
    """How differently the tokens before and after a place are attended to by later queries.

        past_l   = sum of attention over queries [l + w, l + w + rows), keys (l - w, l]
        future_l = the same over keys (l, l + w]
        ratio_l  = (max + 1e-6) / (min + 1e-6)

    Args:
        attention: causal maps [B, L, L], a mean over heads.
        window: w. rows: later queries that count; None: all.
        smooth_ends: ratio 0 for l < 2 w - 1 and l >= L - 2 w, where windows are cut off; False:
            for l < w - 1 and l >= L - w only.

    Precision: float64, by running sums. Cost: O(L^2).
    Source: DHSA, arXiv 2510.24606, 2025, matched to 1e-6.
    """
    op = "boundary_ratios"
    if not isinstance(attention, Tensor) or attention.dim() != 3:
        raise reject(op, "attention", "a tensor [B, L, L]", attention)
    if attention.shape[1] != attention.shape[2]:
        raise reject(op, "attention", "a square map", attention)
    check_integer(op, "window", window)
    check_flag(op, "smooth_ends", smooth_ends)
    if rows is not None:
        check_integer(op, "rows", rows)
    L, device = attention.shape[1], attention.device
    integral = pad(attention.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    place = torch.arange(L, device=device)
    top = (place + window).clamp(max=L)
    bottom = torch.full_like(top, L) if rows is None else (top + rows).clamp(max=L)
    left, middle = (place - window + 1).clamp(min=0), place + 1
    right = (place + window + 1).clamp(max=L)

    def mass(first: Tensor, last: Tensor) -> Tensor:
        corners = [integral[:, y, x] for y, x in ((bottom, last), (top, first))]
        return corners[0] + corners[1] - integral[:, top, last] - integral[:, bottom, first]

    past, future = mass(left, middle), mass(middle, right)
    ratio = (torch.maximum(past, future) + TINY) / (torch.minimum(past, future) + TINY)
    margin = 2 * window if smooth_ends else window
    valid = (place >= margin - 1) & (place < L - margin)
    return torch.where(valid, ratio, 0.0)


def soft_labels(
    ratios: Float[Tensor, "*b l"], *, sharpness: float = 2.0, middle: float = math.log(2 + TINY)
) -> Float[Tensor, "*b l"]:
    """sigmoid(sharpness (ln ratio - middle)): above a half where the ratio is above 2."""
    return torch.sigmoid(sharpness * (torch.log(ratios.clamp(min=1.0) + TINY) - middle))


def boundary_labels(
    attention: Float[Tensor, "b l l"],
    *,
    window: int = 4,
    rows: int | None = None,
    smooth_ends: bool = True,
) -> Float[Tensor, "b l"]:
    """1 where a chunk ends, else 0: where the soft label of the ratio is a half or more."""
    ratios = boundary_ratios(attention, window=window, rows=rows, smooth_ends=smooth_ends)
    return (soft_labels(ratios) >= 0.5).to(attention.dtype)


def boundary_loss(
    logits: Float[Tensor, "b l"],
    target: Float[Tensor, "b l"],
    *,
    window: int = 4,
    focus: float = 2.0,
    pos_weight: float = 1.3,
) -> Float[Tensor, ""]:
    """Focal cross-entropy, mean over the places [2 w - 1, L - 2 w).

    loss = (1 - p_t)^focus BCE(logit, target), positives weighted by `pos_weight`
    """
    op = "boundary_loss"
    check_integer(op, "window", window)
    check_number(op, "focus", focus, least=0.0)
    check_number(op, "pos_weight", pos_weight, above=0.0)
    if logits.shape != target.shape:
        raise reject(op, "target", f"of logits' shape {list(logits.shape)}", target)
    kept = slice(2 * window - 1, logits.shape[-1] - 2 * window)
    logits, target = logits[..., kept], target[..., kept].to(logits.dtype)
    weight = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    entropy = binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weight)
    p = torch.sigmoid(logits)
    right = p * target + (1 - p) * (1 - target)
    return ((1 - right) ** focus * entropy).mean()


@torch.no_grad()
def pick_boundaries(
    scores: Float[Tensor, " l"],
    *,
    count: int,
    threshold: float = 1.1,
    apart: int = 8,
    instruction: int = 0,
) -> Int[Tensor, " m"]:
    """The places with the highest scores above `threshold` that are more than `apart` apart.

    Args:
        scores: of one sequence [L]: logits of a predictor, or ratios.
        count: places, at most.
        apart: 0: the highest, wherever they are.
        instruction: tokens at the end within which there is no boundary. Where they begin is the
            first place taken, to which others keep their distance.

    Returns: places in rising order, int64; a chunk begins at place + 1: `chunks_at`.

    Source: DHSA, arXiv 2510.24606, 2025.
    """
    op = "pick_boundaries"
    if not isinstance(scores, Tensor) or scores.dim() != 1:
        raise reject(op, "scores", "a tensor [L]", scores)
    check_integer(op, "count", count, least=0)
    check_number(op, "threshold", threshold)
    check_integer(op, "apart", apart, least=0)
    check_integer(op, "instruction", instruction, least=0)
    start = len(scores) - instruction
    kept = [start] if instruction and apart else []
    values = scores.tolist()
    for place in scores.argsort(descending=True, stable=True).tolist():
        if values[place] <= threshold or len(kept) >= count:
            break
        if apart and (place >= start or any(abs(place - other) <= apart for other in kept)):
            continue
        kept.append(place)
    return torch.tensor(sorted(kept), dtype=torch.int64, device=scores.device)


def chunks_at(places: Int[Tensor, " m"], length: int) -> Int[Tensor, "1 n"]:
    """Boundaries from 0 to `length` with a chunk beginning behind each place.

    >>> chunks_at(torch.tensor([3, 8]), 12)
    tensor([[ 0,  4,  9, 12]])
    """
    ends = torch.cat([places.new_tensor([0]), places + 1, places.new_tensor([length])])
    return ends.unique()[None]
