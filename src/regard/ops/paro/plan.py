"""A static plan of PAROAttention: the order of the axes and the mask of blocks, per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regard.ops.block_sparse.files import read_plan, write_plan
from regard.ops.paro.orders import check_codes, check_grid

_KIND = "regard paro plan 1"


@dataclass(frozen=True)
class ParoPlan:
    """What calibration found for the heads of one layer.

    codes: int64 [H], the order of the axes (see `orders.py`).
    masks: bool [buckets, H, n, n], blocks of the permuted sequence, text included, that are
        kept; a bucket is a share of the steps of a diffusion run.
    grid, text, block: what it was made for. n = ceil((text + cells) / block).

    >>> plan = ParoPlan(torch.tensor([0, 1]), torch.ones(1, 2, 3, 3).bool(), (4, 5), 0, 8)
    >>> plan.density(), plan.bucket(step=3, steps=10)
    (1.0, 0)
    """

    codes: Tensor
    masks: Tensor
    grid: tuple[int, ...]
    text: int = 0
    block: int = 64

    def __post_init__(self) -> None:
        check_grid("ParoPlan", self.grid, self.text)
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"ParoPlan: block must be an int of at least 1, got {self.block!r}")
        if not isinstance(self.masks, Tensor) or self.masks.dtype != torch.bool:
            raise TypeError("ParoPlan: masks must be a tensor of bool")
        n = -(-self.length // self.block)
        shape = tuple(self.masks.shape)
        if len(shape) != 4 or shape[0] < 1 or shape[2:] != (n, n):
            raise ValueError(
                f"ParoPlan: masks must be of shape [buckets, H, {n}, {n}], got {list(shape)}"
            )
        check_codes("ParoPlan", self.codes, shape[1], len(self.grid))

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.text + math.prod(self.grid)

    def bucket(self, step: int, steps: int) -> int:
        """The bucket of a step, 0 .. steps - 1: int((step + 1) / steps * buckets), the last at
        most."""
        if not 0 <= step < steps:
            raise ValueError(f"ParoPlan: step must be in [0, {steps}), got {step}")
        return min(len(self.masks) - 1, (step + 1) * len(self.masks) // steps)

    def density(self) -> float:
        """The share of the blocks that are kept."""
        return float(self.masks.float().mean())

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors, a bit per block, atomically."""
        fields = {
            "grid": list(self.grid), "text": self.text, "block": self.block,
            "shape": list(self.masks.shape),
        }  # fmt: skip
        tensors = {"codes": self.codes.long(), "masks": pack(self.masks)}
        write_plan(path, _KIND, fields, tensors)

    @classmethod
    def load(cls, path: str | Path, grid: tuple[int, ...] | None = None) -> ParoPlan:
        """Reads what `save` wrote; ValueError for any other file, or for another grid."""
        fields, tensors = read_plan("ParoPlan.load", path, _KIND, "plan of PAROAttention")
        masks = unpack(tensors["masks"], tuple(fields["shape"]))
        plan = cls(tensors["codes"], masks, tuple(fields["grid"]), fields["text"], fields["block"])
        if grid is not None and plan.grid != tuple(grid):
            raise ValueError(
                f"ParoPlan.load: {path} was made for the grid {plan.grid}, not {tuple(grid)}"
            )
        return plan


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as uint8 [ceil(n / 8)], eight to a byte, the first in the lowest bit."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undoes `pack`; ValueError if there are not as many bytes as the shape needs."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(f"unpack: expected {-(-count // 8)} bytes, got {list(packed.shape)}")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:count].view(shape).bool()
