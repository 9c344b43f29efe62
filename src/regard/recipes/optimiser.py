"""Settings of an optimiser: a few numbers that a checkpoint can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from regard.core.checks import check_choice, check_integer, check_number, reject


@dataclass(frozen=True)
class Optimiser:
    """Settings of AdamW, which without weight decay is Adam.

    clip: the norm that the gradient is cut to; None leaves it. warmup: steps over which the
    rate rises linearly from 0. schedule: "cosine" then lets it fall to 0 at the last step.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        check_number("Optimiser", "learning_rate", self.learning_rate, above=0.0)
        check_number("Optimiser", "weight_decay", self.weight_decay, least=0.0)
        if self.clip is not None:
            check_number("Optimiser", "clip", self.clip, above=0.0)
        check_integer("Optimiser", "warmup", self.warmup, least=0)
        check_choice("Optimiser", "schedule", self.schedule, ("constant", "cosine"))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 1, 2, ... of `steps`.

        >>> [Optimiser(1.0, warmup=2, schedule="cosine").rate(i, 6) for i in (1, 2, 4, 6)]
        [0.5, 1.0, 0.5, 0.0]
        """
        if step < self.warmup:
            return self.learning_rate * step / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup) / max(1, steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over all parameters that require gradients, decayed alike."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise reject("train_small", "model", "a module with parameters to train", model)
        return torch.optim.AdamW(
            trained, self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
