"""Next-token logits against those of a run without the image."""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.steer.imbalanced import visual_boost


def contrast_logits(
    scores: Float[Tensor, "b n"],
    without_image: Float[Tensor, "b n"],
    gamma: float = 1.1,
    cutoff: float = 0.1,
) -> Float[Tensor, "b n"]:
    """Contrast the next token's logits with those of a run on the text alone.

        s = log softmax(scores), u = log softmax(without_image),   gamma (s - u) + u

    and -inf where s < max s + ln cutoff. gamma = 1 gives s itself, uncut. Matched to the released
    code (Liu et al., arXiv 2407.21771) to 1e-5.

    >>> seen = torch.tensor([[2.0, 2.0, -9.0]])  # the image says one or two, the text alone two
    >>> contrast_logits(seen, torch.tensor([[0.0, 2.0, 0.0]]), gamma=2.0)
    tensor([[ 0.8532, -1.1468,    -inf]])
    """
    s = torch.log_softmax(scores, -1)
    if gamma == 1:
        return s
    u = torch.log_softmax(without_image, -1)
    kept = s >= s.amax(-1, keepdim=True) + math.log(cutoff)
    return torch.where(kept, gamma * (s - u) + u, -torch.inf)


class contrast_with_text:  # noqa: N801 (used as a function)
    """A logits processor for `generate`: `contrast_logits` with a run on the text alone.

    The run without the image is made beside the generation, one token at a time with a cache of
    its own; where rows change places (beams), it starts over. An open `visual_boost` is paused
    for it, as in the released code.

    Args:
        model: the model that generates.
        text: inputs of the same prompts without image tokens, {"input_ids": ..., ...}.
        prompt: length of the prompt that generates, input_ids.shape[1].
        gamma, cutoff: as in `contrast_logits`.
        boost: the `visual_boost` that is open, if there is one.

        >>> with visual_boost(model) as boost:  # doctest: +SKIP
        ...     contrast = contrast_with_text(model, text, ids.shape[1], gamma=2.0, boost=boost)
        ...     model.generate(**inputs, logits_processor=[contrast])

    Raises: ValueError for another number of prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        text: dict[str, Tensor],
        prompt: int,
        gamma: float = 1.1,
        cutoff: float = 0.1,
        boost: visual_boost | None = None,
    ) -> None:
        self.model, self.text, self.prompt, self.boost = model, text, prompt, boost
        self.gamma, self.cutoff = gamma, cutoff
        # Releases of transformers differ in the name.
        names = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in names else "past_key_values"
        self._before: Tensor | None = None  # tokens that the cache has seen
        self._cache: Any = None

    def __call__(
        self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b n"]:
        if self.gamma == 1:
            return contrast_logits(scores, scores, 1.0)
        with torch.no_grad(), ExitStack() as stack:
            if self.boost is not None:
                stack.enter_context(self.boost.paused())
            plain = self._without_image(input_ids)
        return contrast_logits(scores, plain.to(scores), self.gamma, self.cutoff)

    def _without_image(self, input_ids: Tensor) -> Tensor:
        prompt, mask = self.text["input_ids"], self.text.get("attention_mask")
        B = len(input_ids)
        if B % len(prompt):
            raise ValueError(f"contrast_with_text: text: {len(prompt)} prompts, for a batch of {B}")
        new = input_ids[:, self.prompt :]
        mask = torch.ones_like(prompt) if mask is None else mask
        mask = mask.repeat_interleave(B // len(prompt), 0)
        mask = torch.cat([mask, mask.new_ones(new.shape)], 1)
        goes_on = self._before is not None and torch.equal(self._before, input_ids[:, :-1])
        if not goes_on:
            self._cache = None
        ids = torch.cat([prompt.repeat_interleave(B // len(prompt), 0), new], 1)
        # Padding has no place in the sequence.
        places = (mask.cumsum(1) - 1).clamp_min(0)
        step = slice(-1, None) if goes_on else slice(None)
        result = self.model(
            input_ids=ids[:, step],
            attention_mask=mask,
            position_ids=places[:, step],
            use_cache=True,
            **{self._name: self._cache},
        )
        self._before, self._cache = input_ids.clone(), result[self._name]
        return result.logits[:, -1]
