"""What to hide in each run: random values, frames, bands or superpixels of a spectrogram.

A mask is 1 where the input is kept and 0 where it is occluded. Masks of a spectrogram have the
axes [runs, F, T] (bands, frames) and those of a sequence of vectors [runs, T].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regard.core.checks import check_choice, check_integer, check_number, reject
from regard.lens.inputs import require

Kind = Literal["continuous", "frames", "bands"]
SPES_LEVELS = (2000, 2500, 3000)
REFERENCE_FRAMES = 500


def random_masks(
    runs: int,
    shape: Sequence[int],
    *,
    kind: Kind = "continuous",
    probability: float = 0.5,
    antithetic: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "runs ..."]:
    """Masks whose parts are occluded independently with `probability`.

    kind: "continuous" hides every value for itself; "frames" whole columns and "bands" whole rows
    of a spectrogram `shape = (F, T)`. For a sequence of vectors `shape = (T,)`.
    antithetic: runs 2i and 2i + 1 hide complementary parts (`probability` must be 0.5), which
    halves the variance that comes from how much is hidden.

    >>> random_masks(4, (2, 3), antithetic=True).sum().item()
    12.0
    """
    operation = "random_masks"
    check_integer(operation, "runs", runs, least=1)
    check_choice(operation, "kind", kind, ("continuous", "frames", "bands"))
    _check_probability(operation, probability, antithetic)
    if kind != "continuous" and len(shape) != 2:
        raise reject(operation, "shape", f"(F, T) for kind={kind!r}", tuple(shape))
    parts = {
        "continuous": tuple(shape),
        "frames": (1, shape[-1]),
        "bands": (shape[0], 1),
    }[kind]
    kept = _draws(runs, parts, probability, antithetic, generator)
    return kept.expand(runs, *shape).contiguous()


def slic_masks(
    spectrogram: Float[Tensor, "F T"],
    runs: int,
    *,
    levels: Sequence[int] = SPES_LEVELS,
    probability: float = 0.5,
    longest: int = 750,
    compactness: float = 0.1,
    sigma: float = 1.0,
    antithetic: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "runs F T"]:
    """Masks of superpixels at several levels of detail, as in SPES.

    The spectrogram is scaled to 0 ... 1 and cut by SLIC into about `level · min(T, longest) / 500`
    segments for every level; each level gets an equal share of the runs, in which every segment is
    occluded with `probability`.

    Needs scikit-image (the extra `lens`). Source: SPES, https://arxiv.org/abs/2411.01710.

    Raises:
        ValueError: fewer runs than levels; an input that is not one spectrogram.
        ImportError: scikit-image is not installed.
    """
    operation = "slic_masks"
    if not isinstance(spectrogram, Tensor) or spectrogram.dim() != 2:
        raise reject(operation, "spectrogram", "a tensor [F, T]", spectrogram)
    if not levels or any(level < 1 for level in levels):
        raise reject(operation, "levels", "one or more positive numbers", tuple(levels))
    check_integer(operation, "runs", runs, least=len(levels))
    _check_probability(operation, probability, antithetic)
    slic = require("skimage.segmentation", "lens").slic
    low, high = spectrogram.min(), spectrogram.max()
    scaled = ((spectrogram - low) / (high - low).clamp(min=1e-12)).double().cpu().numpy()
    frames = spectrogram.shape[1]
    made = []
    for level, share in zip(levels, _shares(runs, len(levels), antithetic), strict=True):
        segments = max(1, round(level * min(frames, longest) / REFERENCE_FRAMES))
        labels = torch.from_numpy(
            slic(
                scaled,
                n_segments=segments,
                compactness=compactness,
                sigma=sigma,
                channel_axis=None,
                start_label=0,
            )
        ).long()
        kept = _draws(share, (int(labels.max()) + 1,), probability, antithetic, generator)
        made.append(kept[:, labels])
    return torch.cat(made)


def _shares(runs: int, levels: int, antithetic: bool) -> Iterator[int]:
    """Equal shares, of whole pairs if runs come in pairs."""
    unit = 2 if antithetic and runs >= 2 * levels else 1
    done = 0
    for level in range(1, levels + 1):
        until = runs if level == levels else runs * level // levels // unit * unit
        yield until - done
        done = until


def _check_probability(operation: str, probability: float, antithetic: bool) -> None:
    check_number(operation, "probability", probability, least=0.0)
    if probability > 1:
        raise reject(operation, "probability", "a number between 0 and 1", probability)
    if antithetic and probability != 0.5:
        raise reject(operation, "probability", "0.5 for antithetic masks", probability)


def _draws(
    runs: int,
    parts: Sequence[int],
    probability: float,
    antithetic: bool,
    generator: torch.Generator | None,
) -> Tensor:
    drawn = (runs + 1) // 2 if antithetic else runs
    kept = (torch.rand(drawn, *parts, generator=generator) >= probability).float()
    if not antithetic:
        return kept
    return torch.stack([kept, 1 - kept], dim=1).flatten(0, 1)[:runs]
