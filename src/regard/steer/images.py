"""Where the image is among the tokens of a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn


def image_token_id(model: nn.Module, operation: str) -> int:
    """The token that stands for a piece of an image, from the model's config."""
    config: Any = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise ValueError(
        f"{operation}: image: {type(model).__name__}'s config names no image token; give a mask "
        "[B, T], True where a token of the prompt is of the image"
    )


class ImagePlaces:
    """Watches the calls of a model and keeps which tokens of the last prompt are the image's.

    `image` is a mask [B, T] (or [1, T]) that holds for every prompt, or None: found in the
    `input_ids` of each.
    """

    def __init__(self, model: nn.Module, image: Tensor | None, operation: str) -> None:
        self.token = image_token_id(model, operation) if image is None else None
        if image is not None and (image.ndim != 2 or image.dtype != torch.bool):
            raise ValueError(
                f"{operation}: image: must be a bool mask [B, T], "
                f"got {image.dtype} of shape {list(image.shape)}"
            )
        self.operation, self.given, self.mask = operation, image, image

    def watch(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook (with_kwargs=True) for the model."""
        ids = args[0] if args else kwargs.get("input_ids")
        if self.given is not None or not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        marks = ids == self.token
        if ids.shape[1] > 1 or bool(marks.any()):  # one token of a later call has no image
            self.mask = marks

    def prompt(self, count: int, batch: int) -> Bool[Tensor, "b t"]:
        """The mask of a prompt of `count` tokens in a batch."""
        mask = self.mask
        if mask is None or mask.shape[1] != count or batch % mask.shape[0]:
            came = "none" if mask is None else f"one of shape {list(mask.shape)}"
            raise ValueError(
                f"{self.operation}: image: the prompt is [{batch}, {count}] and the mask of its "
                f"image tokens is {came}"
            )
        return mask.repeat_interleave(batch // mask.shape[0], 0)
