"""A plan of block-sparse attention as an object: checked, measured, drawn, saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.ops.block_sparse.files import read_plan, write_plan

LEVELS = (0, 1, 2, 4, 8)
_KIND = "regard block plan 1"


def _version(levels: Tensor) -> int | None:
    """Counts what is written to a tensor; None for those that do not count."""
    return None if levels.is_inference() else levels._version


@dataclass(frozen=True)
class BlockPlan:
    """Which blocks of keys each block of queries attends to, and at which resolution.

    levels: int8 [Bp, Hp, ceil(T / block_q), ceil(S / block_k)] in {0, 1, 2, 4, 8}.
    T, S: the numbers of queries and keys it is made for; block_q, block_k: of a block.
    grid: the shape of the token grid it was calibrated on, or () for a sequence.

    >>> plan = BlockPlan(torch.tensor([[[[1, 0], [4, 1]]]]), 128, 128, 64, 64)
    >>> plan.density()
    0.5625
    """

    levels: Tensor
    T: int
    S: int
    block_q: int = 128
    block_k: int = 128
    grid: tuple[int, ...] = ()
    _flat: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.levels, Tensor) or self.levels.is_floating_point():
            raise TypeError("BlockPlan: levels must be a tensor of integers")
        for name in ("T", "S"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"BlockPlan: {name} must be an integer >= 0")
        for name in ("block_q", "block_k"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"BlockPlan: {name} must be an integer >= 1")
        shape = -(-self.T // self.block_q), -(-self.S // self.block_k)
        if self.levels.dim() != 4 or tuple(self.levels.shape[2:]) != shape:
            raise ValueError(
                f"BlockPlan: levels must be of shape [B, H, {shape[0]}, {shape[1]}] for "
                f"T={self.T}, S={self.S} in blocks of {self.block_q} x {self.block_k}, "
                f"got {list(self.levels.shape)}"
            )
        allowed = [level for level in LEVELS if not level or self.block_k % level == 0]
        found = self.levels.unique().tolist()
        if not set(found) <= set(allowed):
            raise ValueError(
                f"BlockPlan: levels must be in {allowed} for blocks of {self.block_k} keys, got "
                f"{sorted(set(found) - set(allowed))[:5]}"
            )
        levels = self.levels.to(torch.int8)
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "_flat", None if max(found, default=0) > 1 else _version(levels))

    def for_attention(self) -> Tensor:
        """`levels` as `block_sparse_attention` has the least work with: bool, the same memory,
        if none is above 1 and nobody has written to it since."""
        if self._flat is None or torch.compiler.is_compiling():  # which knows of no writing
            return self.levels
        return self.levels.view(torch.bool) if self._flat == _version(self.levels) else self.levels

    def validate(self, q: Tensor, k: Tensor, grid: tuple[int, ...] | None = None) -> BlockPlan:
        """Itself, if it fits these queries and keys (and this grid); ValueError otherwise."""
        (B, H, T), (Hk, S) = q.shape[:3], k.shape[1:3]
        if (T, S) != (self.T, self.S):
            raise ValueError(
                f"BlockPlan: made for {self.T} queries and {self.S} keys, got {T} and {S}"
            )
        if self.levels.shape[0] not in (1, B) or self.levels.shape[1] not in (1, Hk, H):
            raise ValueError(
                f"BlockPlan: made for {list(self.levels.shape[:2])} batch rows and heads, got "
                f"[{B}, {H}] queries and [{B}, {Hk}] keys"
            )
        if grid is not None and tuple(grid) != self.grid:
            raise ValueError(f"BlockPlan: made for the grid {self.grid}, got {tuple(grid)}")
        return self

    def density(self, causal: bool = False) -> float:
        """The share of the work of dense attention, 1 / level per block.

        With `causal`, of the pairs of blocks that a causal call can see.
        """
        levels = self.levels.float()
        work = torch.where(levels > 0, 1.0 / levels.clamp(min=1.0), 0.0)
        if not causal:
            return float(work.mean()) if work.numel() else 0.0
        last = (torch.arange(1, levels.shape[2] + 1) * self.block_q).clamp(max=self.T) - 1
        seen = last[:, None] + self.S - self.T >= torch.arange(levels.shape[3]) * self.block_k
        total = int(seen.sum()) * levels.shape[0] * levels.shape[1]
        return float((work.cpu() * seen).sum()) / total if total else 0.0

    def to_dense_mask(self) -> Tensor:
        """bool [Bp, Hp, T, S]: which tokens take part, at whatever resolution."""
        kept = (self.levels > 0).repeat_interleave(self.block_q, 2)[:, :, : self.T]
        return kept.repeat_interleave(self.block_k, 3)[..., : self.S]

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device."""
        return BlockPlan(
            self.levels.to(device), self.T, self.S, self.block_q, self.block_k, self.grid
        )

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors, atomically."""
        fields = {
            "T": self.T, "S": self.S, "block_q": self.block_q, "block_k": self.block_k,
            "grid": list(self.grid),
        }  # fmt: skip
        write_plan(path, _KIND, fields, {"levels": self.levels})

    @classmethod
    def load(cls, path: str | Path, grid: tuple[int, ...] | None = None) -> BlockPlan:
        """Reads what `save` wrote; ValueError for any other file, or for another grid."""
        fields, tensors = read_plan("BlockPlan.load", path, _KIND, "block plan")
        plan = cls(tensors["levels"], **{**fields, "grid": tuple(fields["grid"])})
        if grid is not None and plan.grid != tuple(grid):
            raise ValueError(
                f"BlockPlan.load: {path} was made for the grid {plan.grid}, not {tuple(grid)}"
            )
        return plan

    def draw(self, path: str | Path | None = None, head: int = 0, batch: int = 0) -> Any:
        """A picture of one head's levels: dark is full resolution, white is skipped.

        Returns the matplotlib figure, which is also written to `path` if one is given.
        """
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.0, 3.4), layout="constrained")
        axes = figure.subplots()
        colours = ListedColormap(["white", "#123a5c", "#3f78a8", "#86b3d6", "#cfe2f1"])
        norm = BoundaryNorm([-0.5, 0.5, 1.5, 3.0, 6.0, 9.0], 5)
        image = axes.imshow(
            self.levels[batch, head].tolist(), cmap=colours, norm=norm, aspect="auto"
        )
        bar = figure.colorbar(image, ticks=[0, 1, 2.25, 4.5, 7.5])
        bar.ax.set_yticklabels(["skipped", "full", "1/2", "1/4", "1/8"])
        axes.set_xlabel(f"block of {self.block_k} keys")
        axes.set_ylabel(f"block of {self.block_q} queries")
        if path is not None:
            figure.savefig(path)
        return figure
