"""CARVE's maps: the attention of a question against that of a general instruction.

Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning" (arXiv
2509.06461). Matched to the released code: maps to 1e-5, fused maps to 1e-5 (relative).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.lens.entropy import attention_entropy
from regard.lens.inputs import require
from regard.lens.records import Record, drawing
from regard.lens.tap import Attention, points, tap

GENERAL_INSTRUCTION = "Write a general description of the image."
StepMode = Literal["all", "first", "last"]


@dataclass(frozen=True)
class VisualMaps(Record):
    """Attention to the image of one prompt, step by step.

    Attributes:
        maps: [steps, layers, n], float32: of the query that makes each token, the mean over heads
            of its weights on the image's n tokens (not rescaled).
        layers: their numbers.
        tokens: [steps], what was generated, the token that ended the text included; empty where
            the look stopped before there was one.
    """

    maps: Float[Tensor, "t l n"]
    layers: tuple[int, ...]
    tokens: Int[Tensor, " t"]

    @property
    def entropy(self) -> float:
        """The authors' measure of dispersion: the last step's entropy, averaged over layers."""
        return float(attention_entropy(self.maps[-1]).mean())

    def picture(self, path: str | os.PathLike[str], grid: tuple[int, int] | None = None) -> None:
        """The maps of every layer, averaged over the steps."""
        shape = grid_of(self.maps.shape[-1], grid, "VisualMaps.picture")
        with drawing(path, (2.2 * len(self.layers), 2.5), columns=len(self.layers)) as axes:
            for axis, layer, part in zip(axes[0], self.layers, self.maps.mean(0), strict=True):
                axis.imshow(part.reshape(shape).cpu().numpy(), cmap="viridis")
                axis.set_title(f"layer {layer}", fontsize=9)
                axis.set_axis_off()


class _Seen(Exception):
    """Raised inside a forward pass when nothing of interest is left in it."""


def capture_visual_attention(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 32,
    image: Bool[Tensor, "b t"] | None = None,
    where: str | None = None,
    end: int | Sequence[int] | None = None,
    only_first: bool = False,
) -> list[VisualMaps]:
    """Generate greedily and keep where each new token's query looks in the image.

    The last row of weights is formed in the chosen layers only, beside the model's own attention
    and with its cache: no T x T map is asked for, and a step costs one token's forward pass.

    Args:
        model: of transformers, with `generate` and image tokens in its prompt.
        inputs: of a batch of prompts (input_ids, pixel_values, attention_mask, ...), padded on
            the left where their lengths differ.
        layers: of the language model; None: all. Numbers that it does not have raise.
        max_new_tokens: the most steps.
        image: where the prompts' image tokens are; None: where input_ids are the config's.
        where: substring of the language model's paths; None: "language_model" where there is one.
        end: tokens that end the text; None: the generation config's.
        only_first: stop in the middle of the first step, after the last of the chosen layers; no
            token comes out.

    Returns: one `VisualMaps` per prompt, on the CPU; its steps end with its own text.

    Memory: steps x layers x n floats per prompt.
    Raises: ValueError for padding on the right, a prompt without image tokens, or layers that are
        not there.
    """
    ids: Tensor = inputs["input_ids"]
    columns = _columns(model, ids, inputs.get("attention_mask"), image)
    names = [point for point in points(model) if point.kind == "self"]
    if where is None and any("language_model" in point.name for point in names):
        where = "language_model"
    there = [point.layer for point in names if where is None or where in point.name]
    deepest = max(there if layers is None else layers, default=None)
    rows: dict[int, list[list[Tensor]]] = {}

    def look(attention: Attention) -> None:
        T = attention.q.shape[2]
        last = attention.weights_of(rows=range(T - 1, T))[:, :, 0].float().mean(1)
        # A window's cache holds the last keys only: what has left it gets no weight.
        gone = max(attention.offset + T - attention.k.shape[2], 0)
        step = [_at(row, places - gone) for row, places in zip(last, columns, strict=True)]
        rows.setdefault(attention.layer, []).append(step)
        if only_first and attention.layer == deepest:
            raise _Seen

    generator: Any = model
    options = {} if end is None else {"eos_token_id": end}
    made = ids.new_zeros(ids.shape[0], 0)
    with torch.no_grad(), tap(model, read=look, layers=layers, kind="self", where=where):
        try:
            text = generator.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **options
            )
            made = text[:, ids.shape[1] :]
        except _Seen:
            pass
    ends = _ends(model, end)
    found = tuple(sorted(rows))
    results = []
    for row, tokens in enumerate(made.cpu()):
        last = [step for step, token in enumerate(tokens.tolist()) if token in ends]
        count = 1 if only_first else last[0] + 1 if last else len(tokens)
        steps = [torch.stack([rows[n][step][row] for n in found]) for step in range(count)]
        results.append(VisualMaps(torch.stack(steps), found, tokens[:count]))
    return results


def _columns(
    model: nn.Module, ids: Tensor, real: Tensor | None, image: Tensor | None
) -> list[Int[Tensor, " n"]]:
    """Places of the image's tokens in every prompt."""
    name = "capture_visual_attention"
    if image is None:
        config: Any = model.config
        token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if token is None:
            raise ValueError(f"{name}: image: the config names no image token; give a mask [B, T]")
        image = torch.eq(ids, token)
    if image.shape != ids.shape or image.dtype != torch.bool:
        raise ValueError(
            f"{name}: image: must be a bool mask of shape {list(ids.shape)}, "
            f"got {image.dtype} of shape {list(image.shape)}"
        )
    if real is not None and not bool(real[:, -1].all()):
        raise ValueError(f"{name}: inputs: are padded on the right; pad prompts on the left")
    columns = [row.nonzero().flatten().cpu() for row in image]
    if empty := [row for row, places in enumerate(columns) if not len(places)]:
        raise ValueError(f"{name}: image: no token of prompts {empty} is an image's")
    return columns


def _at(row: Float[Tensor, " s"], places: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The row at these places, 0 where they lie before its start."""
    found = row.cpu()[places.clamp_min(0)]
    return torch.where(places >= 0, found, 0.0)


def _ends(model: Any, end: int | Sequence[int] | None) -> set[int]:
    ids = model.generation_config.eos_token_id if end is None else end
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def contrast_attention(
    question: Float[Tensor, "*b n"], general: Float[Tensor, "*b n"], lam: float = 1e-8
) -> Float[Tensor, "*b n"]:
    """What the question adds to the general look: A^Q / (A^G + lam).

    With A = F_visual F_semantic and a general instruction of no meaning of its own, this is the
    one minimiser of Σ (a A^G - A^Q)² + lam Σ a² A^G. A small lam lets tokens that the general
    instruction ignores dominate; lam = 0.1 / n is a floor.

    >>> contrast_attention(torch.tensor([0.2, 0.3]), torch.tensor([0.4, 0.1]), lam=0.0)
    tensor([0.5000, 3.0000])
    """
    if question.shape != general.shape:
        raise ValueError(
            f"contrast_attention: maps of shapes {list(question.shape)} and {list(general.shape)}"
        )
    if lam < 0:
        raise ValueError(f"contrast_attention: lam {lam}: must not be negative")
    return question / (general + lam)


def grid_of(count: int, grid: tuple[int, int] | None, operation: str) -> tuple[int, int]:
    """The rows and columns of `count` image tokens: those given, or a square."""
    if grid is None:
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"{operation}: grid: {count} image tokens are no square; give (rows, columns)"
            )
        return side, side
    if grid[0] * grid[1] != count:
        raise ValueError(f"{operation}: grid {grid}: the maps have {count} tokens")
    return grid


def fuse_maps(
    question: Float[Tensor, "tq l n"],
    general: Float[Tensor, "tg l n"],
    grid: tuple[int, int] | None,
    size: tuple[int, int],
    *,
    layers: Sequence[int] | None = None,
    step_mode: StepMode = "all",
    lam: float = 1e-8,
) -> NDArray[np.float32]:
    """One map over the image's pixels, [height, width].

        S = Σ_t t Σ_l resize(A^Q_{t,l} / (A^G_{t,l} + lam)),   t = 1 ... min(Tq, Tg)

    Every contrasted map is resized (bilinear, as PIL does it) before it is added.

    Args:
        question, general: maps of `VisualMaps`, of the same layers and image.
        grid: rows and columns of the image's tokens; None: a square.
        size: width and height of the image, as PIL has it.
        layers: indices along the maps' second axis; None: all.
        step_mode: "all"; the "first" step only, or the "last" that both have (each of weight 1).
        lam: as in `contrast_attention`.

    Raises: ValueError for maps, grids, layers or step modes that do not fit.
    """
    from PIL import Image

    if step_mode not in ("all", "first", "last"):
        raise ValueError(f"fuse_maps: step_mode {step_mode!r}: must be 'all', 'first' or 'last'")
    if question.shape[1:] != general.shape[1:]:
        raise ValueError(
            f"fuse_maps: maps of shapes {list(question.shape)} and {list(general.shape)}: must "
            "have the same layers and tokens"
        )
    shape = grid_of(question.shape[-1], grid, "fuse_maps")
    common = min(len(question), len(general))
    if not common:
        raise ValueError("fuse_maps: maps of no step")
    count = question.shape[1]
    chosen = list(range(count) if layers is None else layers)
    if wrong := [layer for layer in chosen if not 0 <= layer < count]:
        raise ValueError(f"fuse_maps: layers {wrong}: the maps have layers 0 to {count - 1}")
    used = {"all": range(common), "first": range(1), "last": range(common - 1, common)}[step_mode]
    total = np.zeros((size[1], size[0]), np.float32)
    for step in used:
        weight = step + 1 if step_mode == "all" else 1
        for layer in chosen:
            raw = contrast_attention(question[step, layer], general[step, layer], lam)
            picture = Image.fromarray(raw.float().cpu().numpy().reshape(shape))
            wide = picture.resize(size, Image.Resampling.BILINEAR)
            total += weight * np.asarray(wide, np.float32)
    return total


def color_complexity(image: NDArray[np.uint8]) -> float:
    """Entropy of the hues of an image [H, W, 3] in 180 bins, over ln 180: 0 to 1."""
    rgb = np.asarray(image, np.float64)[..., :3]
    high, low = rgb.max(-1), rgb.min(-1)
    spread = np.where(high > low, high - low, 1.0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        high == r, (g - b) / spread, np.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
    )
    hue = np.where(high > low, (60 * sector) % 360, 0.0)
    counts = np.bincount((hue / 2).astype(int).clip(0, 179).ravel(), minlength=180)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(180))


def texture_complexity(image: NDArray[np.uint8], sigma: float = 1.0) -> float:
    """Share of the pixels of an image [H, W, 3] that Canny's detector calls edges: 0 to 1.

    scikit-image's, with its thresholds (extra `lens`); those of the paper are not known here, so
    compare images by it, not with the paper's numbers.
    """
    require("skimage", "lens")
    from skimage.color import rgb2gray
    from skimage.feature import canny

    return float(canny(rgb2gray(np.asarray(image)[..., :3]), sigma=sigma).mean())
