"""Saliency by occlusion: which inputs change what a model says when they are hidden.

In run k a binary mask `m_k` (1 keep, 0 occlude) multiplies the input. For output token i the run
is scored by how far its distribution moves,

    score_{k,i} = KL(P_i ‖ P_{k,i}) = Σ_v P_i(v) (log P_i(v) − log P_{k,i}(v)),

with P from the run without occlusion, and an element is as salient as the runs that hide it:

    saliency_i = Σ_k score_{k,i} (1 − m_k) / Σ_k (1 − m_k)          (0 where never hidden)

Source: SPES (https://arxiv.org/abs/2411.01710); matched to the authors' code to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.checks import check_choice, check_integer, reject
from regard.lens.inputs import array, tensor
from regard.lens.records import Record, drawing

Scorer = Literal["kl", "predicted_token"]
SCORERS = ("kl", "predicted_token")


def occlusion_scores(
    clean: Float[Tensor, "I V"],
    perturbed: Float[Tensor, "B I V"],
    *,
    scorer: Scorer = "kl",
    tokens: Int[Tensor, " I"] | None = None,
) -> Float[Tensor, "B I"]:
    """How far the distribution of every token moves in every run.

    clean, perturbed: *log*-probabilities, so that none underflows: `log_softmax` of logits.
    scorer: "kl" is KL(clean ‖ perturbed); "predicted_token" is P_i(y_i) − P_{k,i}(y_i) with y =
    `tokens`. float32 inputs are scored in float32.

    Raises:
        ValueError: shapes that do not fit, or no `tokens` for "predicted_token".
    """
    operation = "occlusion_scores"
    check_choice(operation, "scorer", scorer, SCORERS)
    clean = tensor(operation, "clean", clean, axes=2)
    perturbed = tensor(operation, "perturbed", perturbed, axes=3)
    if perturbed.shape[1:] != clean.shape:
        raise reject(operation, "perturbed", f"[B, *{list(clean.shape)}]", perturbed)
    if scorer == "kl":
        # Where P is 0 the term is 0, whatever the logarithms are.
        probability = clean.exp()
        difference = torch.where(probability > 0, clean - perturbed, 0.0)
        return torch.einsum("iv,biv->bi", probability, difference)
    if tokens is None or tokens.shape != clean.shape[:1]:
        raise reject(operation, "tokens", f"ids [{clean.shape[0]}] for this scorer", tokens)
    index = tokens.to(clean.device)[:, None]
    said = clean.gather(1, index)[:, 0].exp()
    return said - perturbed.gather(2, index.expand(len(perturbed), -1, 1))[..., 0].exp()


class OcclusionSum:
    """Adds up batches of runs in float64: numerator [I, ...], denominator [...], in two halves.

    Runs come in pairs (2i, 2i + 1), which antithetic masks make of complementary runs; whole pairs
    go to one half and the other by turns, so that the halves are independent.
    """

    def __init__(self, tokens: int, shape: tuple[int, ...]) -> None:
        self.shape, self.runs = shape, 0
        elements = int(np.prod(shape))
        self.numerator = torch.zeros(2, tokens, elements, dtype=torch.float64)
        self.denominator = torch.zeros(2, elements, dtype=torch.float64)

    def add(self, scores: Float[Tensor, "B I"], masks: Float[Tensor, "B ..."]) -> None:
        """One product of matrices per half, in the scores' precision; masks: 1 where kept."""
        weights = scores.detach().cpu()
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        kept = masks.detach().cpu().to(weights.dtype).flatten(1)
        half = (torch.arange(len(masks)) + self.runs) // 2 % 2
        for number in (0, 1):
            mine = half == number
            if mine.any():
                added = weights[mine].T @ kept[mine].neg_().add_(1)
                self.numerator[number] += added[:-1]
                self.denominator[number] += added[-1]
        self.runs += len(masks)

    def result(self) -> Saliency:
        """The saliency of all runs and of either half."""
        whole = self._quotient(self.numerator.sum(0), self.denominator.sum(0))
        halves = [self._quotient(self.numerator[i], self.denominator[i]) for i in (0, 1)]
        return Saliency(whole, np.stack(halves), self.runs)

    def _quotient(self, numerator: Tensor, denominator: Tensor) -> np.ndarray:
        values = torch.where(denominator > 0, numerator / denominator.clamp(min=1.0), 0.0)
        return values.reshape(-1, *self.shape).float().numpy()


@dataclass(frozen=True)
class Saliency(Record):
    """What every output token depends on.

    values: [I, ...] with the axes of the input. halves: [2, I, ...], the same from two independent
    halves of the runs, which tell how reliable `values` are (`regard.lens.agreement`).
    """

    values: np.ndarray
    halves: np.ndarray
    runs: int

    def picture(self, path: Any) -> None:
        """The map of the first eight tokens, and of all tokens on average."""
        draw_tokens(self.values, path)


def draw_tokens(values: Float[np.ndarray, "I ..."], path: Any) -> None:
    """A picture of the maps of the first eight tokens, and of all tokens on average."""
    maps = [*values[:8], values.mean(0)]
    titles = [*(f"token {i}" for i in range(len(maps) - 1)), "mean of all tokens"]
    with drawing(path, (8, 1.6 * len(maps)), len(maps)) as axes:
        for row, title, part in zip(axes[:, 0], titles, maps, strict=True):
            row.imshow(np.atleast_2d(part), aspect="auto", origin="lower")
            row.set_title(title)


def occlusion_saliency(
    run: Callable[[Float[Tensor, "B ..."]], Float[Tensor, "B I V"]],
    masks: Float[Tensor, "M ..."],
    *,
    clean: Float[Tensor, "I V"] | None = None,
    scorer: Scorer = "kl",
    tokens: Int[Tensor, " I"] | None = None,
    batch_size: int = 16,
) -> Saliency:
    """The saliency of an input for any model.

    run: log-probabilities [B, I, V] of the model whose input is multiplied by masks [B, ...].
    masks: from `regard.lens.occlusion_masks`. clean: log-probabilities without occlusion; None
    calls `run` with ones. Memory: one batch of runs and [I, ...]; cost: M forward passes.

    >>> def run(masks):  # the only token depends on the first of three inputs
    ...     return torch.log_softmax(torch.stack([masks[:, :1], 0 * masks[:, :1]], dim=-1), -1)
    >>> from regard.lens.occlusion_masks import random_masks
    >>> occlusion_saliency(run, random_masks(64, (3,))).values.argmax()
    np.int64(0)
    """
    operation = "occlusion_saliency"
    masks = tensor(operation, "masks", masks, axes=2, more=True)
    check_integer(operation, "batch_size", batch_size)
    with torch.inference_mode():
        clean = run(torch.ones_like(masks[:1]))[0] if clean is None else clean
        total = OcclusionSum(clean.shape[0], tuple(masks.shape[1:]))
        for batch in masks.split(batch_size):
            scores = occlusion_scores(clean, run(batch), scorer=scorer, tokens=tokens)
            total.add(scores, batch)
    return total.result()


def token_saliency(
    scores: Float[Tensor, "M I"], masks: Float[Tensor, "M I ..."]
) -> Float[Tensor, "I I channels"]:
    """The saliency of previous tokens, from runs in which their embeddings were occluded.

    Row i uses positions up to and including i of the decoder's input; later ones are 0. masks:
    [M, I] for whole embeddings (one channel) or [M, I, E].
    """
    operation = "token_saliency"
    scores = tensor(operation, "scores", scores, axes=2)
    masks = tensor(operation, "masks", masks, axes=2, more=True)
    if masks.shape[:2] != scores.shape:
        raise reject(operation, "masks", f"[{scores.shape[0]}, {scores.shape[1]}, ...]", masks)
    total = OcclusionSum(scores.shape[1], tuple(masks.reshape(*scores.shape, -1).shape[1:]))
    total.add(scores, masks.reshape(*scores.shape, -1))
    seen = torch.ones(scores.shape[1], scores.shape[1]).tril()
    return torch.from_numpy(total.result().values) * seen[..., None]


def values_of(saliency: Saliency | Tensor | np.ndarray) -> Tensor:
    """The map of a saliency, or the array itself, as a tensor."""
    return torch.as_tensor(array(saliency.values if isinstance(saliency, Saliency) else saliency))
