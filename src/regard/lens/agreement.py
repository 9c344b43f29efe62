"""Do two maps of relevance agree? Pooling, normalising, correlating, and how much noise allows.

A map has a row per output token and, in its other axes, the input. Attention over encoder frames
[I, T'] and the saliency of a spectrogram [I, F, T] are brought to one shape by pooling, to one
scale per token by normalising, and compared by their correlation. A saliency estimated from few
runs is noisy: `reliability` tells from its two halves how far it would correlate with itself, and
no attention can be expected to correlate better than `ceiling`.

Source: https://arxiv.org/abs/2509.18010 (pooling, correlation) and the normalisers of SPES,
https://arxiv.org/abs/2411.01710, matched to the authors' code to 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.core.checks import check_choice, check_integer, reject
from regard.lens.inputs import array, tensor
from regard.lens.records import Record, drawing

Pool = Literal["max2d", "mean", "max_time_mean_bands", "mean_time_max_bands"]
Kind = Literal["pearson", "spearman"]


def pool_saliency(
    saliency: Float[Tensor, "I F T"], frames: int, *, mode: Pool = "max2d", time_axis: int = -1
) -> Float[Tensor, "I frames"]:
    """The saliency of a spectrogram per frame of the encoder.

    Frame j covers inputs floor(j T / frames) ... ceil((j + 1) T / frames), so that T need not be a
    multiple of `frames`. mode: "max2d", the largest value over its inputs and all bands, correlates
    best with attention; "mean" averages both; the others do one and the other.
    time_axis: -1 for [I, F, T], 1 for [I, T, F].
    """
    operation = "pool_saliency"
    modes = ("max2d", "mean", "max_time_mean_bands", "mean_time_max_bands")
    check_choice(operation, "mode", mode, modes)
    check_integer(operation, "frames", frames)
    values = tensor(operation, "saliency", saliency, axes=3)
    if time_axis not in (-1, 1, 2):
        raise reject(operation, "time_axis", "-1, 2 or 1", time_axis)
    values = values.transpose(1, 2) if time_axis == 1 else values
    if frames > values.shape[2]:
        raise reject(operation, "frames", f"at most the {values.shape[2]} of the input", frames)
    over_bands = torch.amax if mode in ("max2d", "mean_time_max_bands") else torch.mean
    over_time = (
        torch.nn.functional.adaptive_max_pool1d
        if mode in ("max2d", "max_time_mean_bands")
        else torch.nn.functional.adaptive_avg_pool1d
    )
    return over_bands(over_time(values, frames), dim=1)


def normalise_map(values: Float[Tensor, "I ..."]) -> Float[Tensor, "I ..."]:
    """Every token's map to mean 0 and sample deviation 1; a constant map to 0."""
    values = tensor("normalise_map", "values", values, axes=2, more=True)
    return _standard(values.flatten(1)).reshape(values.shape)


def normalise_saliency(
    saliency: Float[Tensor, "I ..."],
    tokens: Float[Tensor, "I I ..."] | None = None,
    *,
    to: Literal["mean_std", "paired_min_max"] = "mean_std",
) -> tuple[Tensor, Tensor | None]:
    """The saliency of the input and of the previous tokens, on one scale per output token.

    to: "mean_std" is `normalise_map`, for row i of `tokens` over positions up to i (the others
    become 0). "paired_min_max" goes on from there: one minimum and one maximum over both maps of a
    token bring both to 0 ... 1.
    """
    operation = "normalise_saliency"
    check_choice(operation, "to", to, ("mean_std", "paired_min_max"))
    values = normalise_map(saliency)
    count = len(values)
    seen = None
    if tokens is not None:
        tokens = tensor(operation, "tokens", tokens, axes=2, more=True)
        if tokens.shape[:2] != (count, count):
            raise reject(operation, "tokens", f"[{count}, {count}, ...]", tokens)
        seen = torch.zeros_like(tokens)
        for i, row in enumerate(tokens):
            seen[i, : i + 1] = _standard(row[: i + 1].reshape(1, -1)).reshape(row[: i + 1].shape)
    if to == "mean_std":
        return values, seen
    return paired_min_max(values, seen)


normalize_saliency = normalise_saliency  # the other spelling


def paired_min_max(
    saliency: Float[Tensor, "I ..."], tokens: Float[Tensor, "I I ..."] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Both maps of every token to 0 ... 1 by their common minimum and maximum.

    Positions of `tokens` after i take no part and stay 0. A token whose maps are constant gets 0.
    """
    values = tensor("paired_min_max", "saliency", saliency, axes=2, more=True).clone()
    seen = None if tokens is None else torch.zeros_like(tokens)
    for i, row in enumerate(values):
        parts = [row] if tokens is None else [row, tokens[i, : i + 1]]
        low = min(part.min() for part in parts)
        span = max(part.max() for part in parts) - low
        values[i] = _ratio(row - low, span)
        if tokens is not None and seen is not None:
            seen[i, : i + 1] = _ratio(tokens[i, : i + 1] - low, span)
    return values, seen


def _standard(rows: Tensor) -> Tensor:
    """Rows [N, X] to mean 0, deviation 1; constant rows, and rows of one value, to 0."""
    if rows.shape[1] < 2:
        return torch.zeros_like(rows)
    centred = rows - rows.mean(1, keepdim=True)
    return _ratio(centred, rows.std(1, keepdim=True))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    found = numerator / denominator
    return torch.where(found.isfinite(), found, 0.0)


def correlate(
    a: Float[Tensor, "I ..."],
    b: Float[Tensor, "I ..."],
    *,
    kind: Kind = "pearson",
    per: Literal["map", "token"] = "map",
    rows: Sequence[int] | None = None,
) -> Tensor:
    """The correlation of two maps: one number, or with per="token" one for every row [I].

    kind: "spearman" correlates ranks, of equal values their mean rank. rows: which tokens count,
    such as those that are no special tokens. Computed in float64. A constant map correlates with
    nothing: 0, never NaN.

    >>> a = torch.tensor([[0.0, 1.0, 2.0]])
    >>> [round(float(correlate(a, b)), 6) for b in (a, -a, 0 * a)]
    [1.0, -1.0, 0.0]
    """
    operation = "correlate"
    check_choice(operation, "kind", kind, ("pearson", "spearman"))
    check_choice(operation, "per", per, ("map", "token"))
    first = tensor(operation, "a", a, axes=1, more=True).double()
    second = tensor(operation, "b", b, axes=1, more=True).double()
    if first.shape != second.shape:
        raise reject(operation, "b", f"of the shape of a, {list(first.shape)}", second)
    if rows is not None:
        chosen = torch.as_tensor(list(rows), dtype=torch.long)
        if len(chosen) == 0 or chosen.min() < -len(first) or chosen.max() >= len(first):
            raise reject(operation, "rows", f"numbers of rows below {len(first)}", rows)
        first, second = first[chosen], second[chosen]
    pair = torch.stack([first, second])
    pair = pair.flatten(2) if per == "token" and pair.dim() > 2 else pair.reshape(2, 1, -1)
    if kind == "spearman":
        pair = torch.stack([torch.stack([ranks(row) for row in side]) for side in pair])
    constant = (pair == pair[..., :1]).all(-1).any(0)
    centred = pair - pair.mean(-1, keepdim=True)
    length = centred.norm(dim=-1)
    found = (centred[0] * centred[1]).sum(-1) / (length[0] * length[1])
    found = torch.where(constant | ~found.isfinite(), 0.0, found.clamp(-1, 1))
    return found if per == "token" else found[0]


def ranks(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Ranks from 1; equal values share their mean rank.

    >>> ranks(torch.tensor([5.0, 1.0, 5.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def mean_correlation(correlations: Iterable[float]) -> float:
    """The mean of correlations on Fisher's scale, tanh(mean(atanh ρ))."""
    values = np.clip(np.asarray(list(correlations), dtype=float), -1 + 1e-12, 1 - 1e-12)
    return float(np.tanh(np.arctanh(values).mean()))


def reliability(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> float:
    """How far a map of all runs would correlate with its repetition: 2ρ / (1 + ρ) (Spearman-Brown).

    ρ is the correlation of the maps of two independent halves of the runs; 0 if it is negative.
    """
    found = max(float(correlate(torch.as_tensor(first), torch.as_tensor(second))), 0.0)
    return 2 * found / (1 + found)


@dataclass(frozen=True)
class Agreement(Record):
    """How attention agrees with a saliency.

    all: of the mean of all heads and layers; layer [L]: of the mean of a layer's heads; head
    [L, H]; token [I]: of the mean of all, for every output token alone. reliability: of the
    saliency; ceiling: its square root, what noiseless truth would reach (NaN without halves).
    """

    all: float
    layer: np.ndarray
    head: np.ndarray
    token: np.ndarray
    kind: str
    reliability: float
    ceiling: float

    @property
    def corrected(self) -> float:
        """`all` divided by `ceiling`: agreement with the saliency that endless runs would give."""
        return self.all / self.ceiling if self.ceiling > 0 else math.nan

    def picture(self, path: Any) -> None:
        """Correlation per head and layer, and of the means."""
        layers = np.concatenate([self.head, self.layer[:, None]], axis=1)
        with drawing(path, (1.2 + 0.6 * layers.shape[1], 1.2 + 0.5 * len(layers))) as axes:
            axes = axes[0, 0]
            image = axes.imshow(layers, cmap="RdBu_r", vmin=-1, vmax=1)
            for (row, column), value in np.ndenumerate(layers):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
            names = [*map(str, range(layers.shape[1] - 1)), "mean"]
            axes.set_xticks(range(layers.shape[1]), names)
            axes.set_yticks(range(len(layers)))
            axes.set(xlabel="head", ylabel="layer", title=f"all: {self.all:.2f} ({self.kind})")
            axes.figure.colorbar(image, ax=axes)


def agreement(
    attention: Float[Tensor, "L H I S"],
    saliency: Float[Tensor, "I S"],
    *,
    halves: Float[Tensor, "2 I S"] | None = None,
    kind: Kind = "pearson",
    rows: Sequence[int] | None = None,
) -> Agreement:
    """Correlates attention with a saliency per head, per layer, per token and all in all.

    Every row of either map is first normalised (`normalise_map`). halves: the saliency from two
    independent halves of its runs, for the ceiling. rows: which tokens count.
    """
    operation = "agreement"
    weights = tensor(operation, "attention", attention, axes=4).double()
    wanted = normalise_map(tensor(operation, "saliency", saliency, axes=2).double())
    if weights.shape[2:] != wanted.shape:
        raise reject(operation, "saliency", f"{list(weights.shape[2:])}", wanted)

    def rho(values: Tensor) -> float:
        return float(correlate(normalise_map(values), wanted, kind=kind, rows=rows))

    everything = weights.mean((0, 1))
    per_token = correlate(normalise_map(everything), wanted, kind=kind, per="token", rows=rows)
    trust = math.nan
    if halves is not None:
        first, second = (normalise_map(torch.as_tensor(half).double()) for half in halves)
        chosen = slice(None) if rows is None else list(rows)
        trust = reliability(first[chosen], second[chosen])
    return Agreement(
        all=rho(everything),
        layer=np.array([rho(layer.mean(0)) for layer in weights]),
        head=np.array([[rho(head) for head in layer] for layer in weights]),
        token=array(per_token),
        kind=kind,
        reliability=trust,
        ceiling=math.sqrt(trust) if trust >= 0 else math.nan,
    )
