"""The config of the Wan video transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regard.core.checks import check_integer, check_number, reject


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer; those of Wan2.1-T2V-1.3B by default.

    heads, head_dim: the width is their product; a head's channels are split among the three
        axes for the rotary positions, so head_dim is even.
    patch: latent cells of a token along time, height and width.
    channels, channels_out: of the latent that goes in and of the one that comes out.
    text_dim: of a token of the prompt. freq_dim: channels of the encoding of time, even.
    mlp_dim, layers, eps: of the blocks. rope: base of the rotary positions.

    >>> WanConfig().dim, WanConfig().rope_split
    (1536, (44, 42, 42))
    """

    heads: int = 12
    head_dim: int = 128
    layers: int = 30
    mlp_dim: int = 8960
    channels: int = 16
    channels_out: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope: float = 10000.0

    def __post_init__(self) -> None:
        op = type(self).__name__
        names = ("heads", "head_dim", "layers", "mlp_dim", "channels", "channels_out")
        for name in (*names, "text_dim", "freq_dim"):
            check_integer(op, name, getattr(self, name))
        for name in ("head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise reject(op, name, "even", getattr(self, name))
        if self.head_dim < 6:
            raise reject(op, "head_dim", "at least 6, for three axes", self.head_dim)
        fits = len(self.patch) == 3 and all(isinstance(n, int) and n > 0 for n in self.patch)
        if not fits:
            raise reject(op, "patch", "three positive ints", self.patch)
        check_number(op, "eps", self.eps, above=0.0)
        check_number(op, "rope", self.rope, above=0.0)

    @property
    def dim(self) -> int:
        """The width of a token."""
        return self.heads * self.head_dim

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """A head's channels for time, height and width."""
        space = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * space, space, space

    def plain(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "patch": list(self.patch)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> WanConfig:
        """The inverse of `plain`."""
        return cls(**{**plain, "patch": tuple(plain["patch"])})
