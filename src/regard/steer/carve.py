"""CARVE: show a vision-language model the part of the image that its question is about.

Ge et al. (arXiv 2509.06461): contrast the question's attention with that of a general instruction
(`regard.lens.contrast`), keep the strongest regions, black out the rest, crop, magnify, ask again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.lens.contrast import (
    GENERAL_INSTRUCTION,
    StepMode,
    VisualMaps,
    capture_visual_attention,
    fuse_maps,
)
from regard.lens.records import Record, drawing

Strategy = Literal["attention_sum", "size", "remove_small"]
Prepare = Callable[[list[NDArray[np.uint8]], str], dict[str, Any]]
SUFFIX = " Answer the question using a single word or phrase."


def read_image(image: Any) -> NDArray[np.uint8]:
    """An image as uint8 [H, W, 3]: from a file, a picture of PIL, or such an array itself.

    Raises: ValueError for a file that is not there or is no whole image, or an array of another
    kind; TypeError for anything else.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(Path(image)) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"carve: image: {os.fspath(image)!r} cannot be read: {error}"
            ) from error
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"carve: image: must be a path, a picture of PIL or an array, got "
            f"{type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"carve: image: {image.dtype} {list(image.shape)}: must be uint8 [H, W, 3]"
        )
    return image


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Regions of True that touch at edges (4 neighbours), numbered from 1 in reading order.

    Runs of True in a row are joined with those they touch in the row above, so that the loop is
    over runs, not over pixels.
    """
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for run, row in enumerate(rows.tolist()):
        while above < run and (
            rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[run])
        ):
            above += 1
        other = above
        while rows[other] == row - 1 and starts[other] < ends[run]:
            one, two = sorted((root(other), root(run)))
            parent[two] = one  # the first run of a region stands for it
            other += 1
    first, number = np.unique([root(run) for run in range(len(parent))], return_inverse=True)
    labels = np.zeros(mask.shape, np.int64)
    labels[mask] = np.repeat(number + 1, ends - starts)
    return labels, len(first)


def select_regions(
    fused: NDArray[np.floating],
    p: float = 0.2,
    k: int = 3,
    strategy: Strategy = "attention_sum",
    outlier_percent: float = 0.1,
) -> NDArray[np.bool_]:
    """The pixels to keep: strong connected regions of a fused map.

    Pixels at or above the percentile 100 (1 - p) fall into regions (of edge neighbours), of which
    the first max(k, floor(number of regions * p)) stay, in the order of their sum of `fused`
    ("attention_sum") or their size ("size"); or, whatever k, all that have at least
    floor(outlier_percent / 100 * pixels above the threshold) pixels ("remove_small"). Ties keep
    reading order. A map that is the same everywhere keeps all.

    Matched to the released code's masks exactly.
    Raises: ValueError for values out of range or a map that is not finite.

    >>> fused = np.array([[0.0, 0.9, 0.0, 0.5], [0.0, 0.8, 0.0, 0.4]])
    >>> select_regions(fused, p=0.5, k=1).astype(int)
    array([[0, 1, 0, 0],
           [0, 1, 0, 0]])
    """
    if not 0 < p <= 1 or k < 1:
        raise ValueError(f"select_regions: p {p}, k {k}: must be in (0, 1] and at least 1")
    if strategy not in ("attention_sum", "size", "remove_small"):
        raise ValueError(
            f"select_regions: strategy {strategy!r}: must be 'attention_sum', 'size' or "
            "'remove_small'"
        )
    if fused.ndim != 2 or not np.isfinite(fused).all():
        raise ValueError(f"select_regions: fused {fused.shape}: must be a finite map [H, W]")
    mask = fused >= np.percentile(fused, 100 * (1 - p))
    labels, count = label_components(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if strategy == "remove_small":
        kept = np.flatnonzero(sizes >= int(mask.sum() * outlier_percent / 100)) + 1
    else:
        sums = np.bincount(labels.ravel(), fused.ravel().astype(np.float64), count + 1)[1:]
        order = np.argsort(-(sums if strategy == "attention_sum" else sizes), kind="stable")
        kept = order[: max(k, int(count * p))] + 1
    return np.isin(labels, kept)


@dataclass(frozen=True)
class Refined:
    """`image` [h, w, 3], cropped and magnified; `masked`, of the original size; the `box`.

    The box is (left, top, right, bottom), right and bottom excluded.
    """

    image: NDArray[np.uint8]
    masked: NDArray[np.uint8]
    box: tuple[int, int, int, int]


def refine_image(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> Refined:
    """Black out what the mask leaves out, crop to it and magnify to the original's size.

    The scale is max(W / w, H / h), so that the crop keeps its shape and no side ends up shorter
    than the image's; resized by Lanczos, sizes truncated. A mask of ones gives the image itself.

    Matched to the released code: boxes and masked images exactly, refined ones to less than a
    grey level on average.
    Raises: ValueError for an image that is not uint8 [H, W, 3], another mask, or an empty one.
    """
    from PIL import Image

    image = np.asarray(image)
    whole = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if not whole or image.shape[:2] != mask.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"refine_image: image {image.dtype} {image.shape}, mask {mask.dtype} {mask.shape}: "
            "must be uint8 [H, W, 3] and bool [H, W]"
        )
    ys, xs = np.nonzero(mask)
    if not len(ys):
        raise ValueError("refine_image: mask: is empty")
    box = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    masked = image * mask[..., None].astype(np.uint8)
    crop = Image.fromarray(masked).crop(box)
    width, height = image.shape[1], image.shape[0]
    # The larger of the two factors, in whole numbers: a side that fits exactly is not cut by one.
    up, down = max((width, crop.width), (height, crop.height), key=lambda pair: pair[0] / pair[1])
    size = crop.width * up // down, crop.height * up // down
    refined = crop if size == crop.size else crop.resize(size, Image.Resampling.LANCZOS)
    return Refined(np.asarray(refined), masked, box)


@dataclass(frozen=True)
class Carved(Record):
    """What `carve` did for one question.

    Attributes:
        answer: token ids of the final text.
        image: the original.
        fused: [H, W], the contrasted attention over its pixels.
        mask: [H, W], what was kept of it.
        refined: the picture that was shown.
    """

    answer: Int[Tensor, " t"]
    image: NDArray[np.uint8]
    fused: NDArray[np.float32]
    mask: NDArray[np.bool_]
    refined: Refined

    def picture(self, path: str | os.PathLike[str]) -> None:
        """The original, the map over it, what was kept, and the refined image."""
        parts = {
            "image": self.image,
            "contrasted attention": self.fused,
            "kept": self.refined.masked,
            "refined": self.refined.image,
        }
        with drawing(path, (10, 2.9), columns=4) as axes:
            for axis, (title, part) in zip(axes[0], parts.items(), strict=True):
                axis.imshow(part, cmap="viridis")
                axis.set_title(title, fontsize=10)
                axis.set_axis_off()


def with_processor(processor: Any) -> Prepare:
    """Inputs of one user turn, images first, from a processor of transformers and its template.

    >>> prepare = with_processor(processor)  # doctest: +SKIP
    >>> prepare([image], "Where is the cat?")["input_ids"].shape  # doctest: +SKIP
    torch.Size([1, 597])
    """

    def prepare(images: list[NDArray[np.uint8]], text: str) -> dict[str, Any]:
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return dict(processor(images=images, text=prompt, return_tensors="pt"))

    return prepare


def carve(
    model: nn.Module,
    prepare: Prepare,
    image: Any,
    questions: str | Sequence[str],
    *,
    grid: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
    p: float = 0.2,
    k: int = 3,
    strategy: Strategy = "attention_sum",
    outlier_percent: float = 0.1,
    step_mode: StepMode = "all",
    lam: float = 1e-8,
    include_original: bool = True,
    instruction: str = GENERAL_INSTRUCTION,
    general: VisualMaps | None = None,
    suffix: str = SUFFIX,
    max_new_tokens: int = 32,
    where: str | None = None,
) -> list[Carved]:
    """Ask questions about one image, each with its own refined copy of it.

    Three passes: the question and a general instruction, each with a look at where they attend
    (`capture_visual_attention`); their contrast (`fuse_maps`) chooses regions (`select_regions`),
    which are cut out and magnified (`refine_image`); then the question again, with the result.
    The general look is taken once per image, not per question.

    Args:
        model: of transformers, with `generate`.
        prepare: (images [H, W, 3], text) -> the model's inputs for one prompt, on its device;
            `with_processor` makes one. The final prompt has both images, the original first,
            unless include_original is False (as the paper's algorithm, not its code).
        image: uint8 [H, W, 3], a picture of PIL, or a file.
        questions: one or several.
        grid: rows and columns of the image's tokens; None: a square.
        layers: of the language model, such as range(20, 26) (the authors', of 28 to 32); None:
            all.
        p, k, strategy, outlier_percent: as in `select_regions`. With p = 1 the refined image is
            the image.
        step_mode, lam: as in `fuse_maps`. With "first", looks stop after the last of the layers
            and nothing is generated for them.
        instruction, suffix: text of the general look, and what follows every text.
        general: an earlier general look at the same image with the same settings; None: taken.
        max_new_tokens: for the looks and for the answer.

    Raises: ValueError for an image that cannot be read, and as the functions it is made of.
    """
    image = read_image(image)
    first = step_mode == "first"

    def look(text: str) -> VisualMaps:
        inputs = prepare([image], text + suffix)
        count = 1 if first else max_new_tokens
        (found,) = capture_visual_attention(
            model, inputs, layers=layers, max_new_tokens=count, where=where, only_first=first
        )
        return found

    general = look(instruction) if general is None else general
    generator: Any = model
    results = []
    for question in [questions] if isinstance(questions, str) else questions:
        asked = look(question)
        size = (image.shape[1], image.shape[0])
        fused = fuse_maps(asked.maps, general.maps, grid, size, step_mode=step_mode, lam=lam)
        mask = select_regions(fused, p, k, strategy, outlier_percent)
        refined = refine_image(image, mask)
        shown = [image, refined.image] if include_original else [refined.image]
        inputs = prepare(shown, question + suffix)
        with torch.no_grad():
            text = generator.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answer = text[0, inputs["input_ids"].shape[1] :]
        results.append(Carved(answer, image, fused, mask, refined))
    return results
