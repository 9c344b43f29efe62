"""What every row of a benchmark has in common: the sizes, the dtype, the device, the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regard.core.card import Card, Operand
from regard.core.patterns import Pattern
from regard.testing.calls import ARGUMENTS, Call, sample

LENGTHS = (512, 2048, 8192)
PATIENCE = 4.0
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Setting:
    """All that is asked of every mechanism alike, in values that JSON can carry.

    T = S = length, H = Hk = `heads`, D = Dv = `dim`. `backward` times a forward and a backward
    pass together. `patience`: seconds of one row after which no further run is started.
    """

    lengths: tuple[int, ...] = LENGTHS
    heads: int = 4
    dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    causal: bool = True
    backward: bool = False
    threads: int = 1
    seed: int = 0
    patience: float | None = PATIENCE

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Setting:
        """From what `asdict` gave, perhaps by way of JSON."""
        return cls(**{**values, "lengths": tuple(values["lengths"])})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v."""
        return DTYPES[self.dtype]

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda"."""
        return torch.device(self.device).type

    def sizes(self, length: int) -> dict[str, int]:
        """Axis letter -> size."""
        return {
            "b": self.batch,
            "h": self.heads,
            "hk": self.heads,
            "t": length,
            "s": length,
            "d": self.dim,
            "dv": self.dim,
        }

    def why_unfit(self, card: Card) -> str | None:
        """Why a mechanism cannot serve this mask, or None."""
        if self.causal and Pattern.CAUSAL_SELF not in card.patterns:
            return "it has no causal form"
        if not self.causal and Pattern.NONCAUSAL_SELF not in card.patterns:
            return "it has only a causal form"
        if {"T", "S"} & set(card.cases[0].dims):
            return "its case fixes the length"
        return None

    def call(self, card: Card | None, length: int) -> Call:
        """The arguments of one call: q, k, v are the same for every mechanism, and normal.

        Further operands come from the domain on the card, options from its first case. With
        `card` None, the call is one of torch's own function.
        """
        operands: Sequence[Operand] = (*ARGUMENTS, *(card.operands if card else ()))
        generator = torch.Generator().manual_seed(self.seed)
        call = sample(operands, self.sizes(length), generator).to(self.torch_dtype)
        if card is not None:
            call = call.with_options(**card.cases[0].options)
        if card is None or card.accepts("causal"):
            call = call.with_options(causal=self.causal)
        return call.on(self.device)
