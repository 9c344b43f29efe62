"""The published configurations, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from regard.core.checks import check_choice, check_integer, reject
from regard.ops.pyramid_sparse.levels import IMPORTANCES, MODES, check_ratios

REARRANGEMENTS = ("none", "gilbert", "tile", "semantic", "hybrid")


def shares(*ends: float) -> Mapping[int, float]:
    """The ends of levels 1, 2, 4, 8; level 0 has the rest."""
    return MappingProxyType(dict(zip((1, 2, 4, 8, 0), (*ends, 1.0), strict=True)))


@dataclass(frozen=True)
class PyramidConfig:
    """What `PyramidSparseAttention` needs to know.

    Fields:
        ratios, mode, importance, block_q, block_k, similarity_caps, tile, compat: as in
            `pyramid_levels`.
        causal: then nothing is rearranged.
        rearrange: the order of the tokens: "none", "gilbert", "tile", "semantic" (clusters of q
            and of k), "hybrid" (q along the curve, k in clusters).
        tile_shape: of "tile", in the axes of the grid.
        text: tokens that stand in front of the grid. Along a curve and in clusters they go
            behind it and come back. With `causal` they are the last tokens, and stay there.
        protect_text: level 1 for the blocks of keys that hold text. `compat="official"` takes
            the last blocks wherever the text is.
        clusters: of queries and of keys.
        dense_steps: of a diffusion run, the first that attend to everything.
        seed: of the sampled offsets; None spreads them evenly.
    """

    ratios: Mapping[int, float] = field(default_factory=lambda: shares(0.1, 0.15, 0.15, 0.35))
    mode: str = "topk"
    importance: str = "sampled"
    block_q: int = 128
    block_k: int = 64
    causal: bool = False
    similarity_caps: tuple[float, float, float] | None = None
    rearrange: str = "none"
    tile_shape: tuple[int, ...] = ()
    text: int = 0
    protect_text: bool = True
    clusters: tuple[int, int] = (200, 1000)
    dense_steps: int = 0
    tile: int | None = 32
    seed: int | None = None
    compat: str | None = None

    def __post_init__(self) -> None:
        name = "PyramidConfig"
        check_choice(name, "mode", self.mode, MODES)
        check_choice(name, "importance", self.importance, IMPORTANCES)
        check_choice(name, "rearrange", self.rearrange, REARRANGEMENTS)
        for size in ("block_q", "block_k"):
            check_integer(name, size, getattr(self, size))
        for size in ("text", "dense_steps"):
            check_integer(name, size, getattr(self, size), least=0)
        check_ratios(name, self.ratios, self.block_k)
        if self.causal and self.rearrange != "none":
            raise reject(name, "rearrange", '"none" where causal', self.rearrange)
        if (self.rearrange == "tile") != bool(self.tile_shape):
            raise reject(name, "tile_shape", 'given with rearrange="tile" only', self.tile_shape)
        object.__setattr__(self, "ratios", MappingProxyType(dict(self.ratios)))


def _video(block_k: int, mode: str, *ends: float, dense: int = 15, **more: object) -> PyramidConfig:
    options = {"rearrange": "gilbert", "protect_text": False, **more}
    return PyramidConfig(shares(*ends), mode, block_k=block_k, dense_steps=dense, **options)  # pyright: ignore[reportArgumentType]


# The released list format guarantees nothing to text, so `protect_text` is False where it is used.
PRESETS: Mapping[str, PyramidConfig] = MappingProxyType({
    "wan2.1-14b": _video(128, "thresholdbound", 0.4, 0.5, 0.6, 0.8),
    "wan2.1-1.3b": _video(
        128, "thresholdbound", 0.5, 0.6, 0.7, 0.8, similarity_caps=(0.7, 0.65, 0.6),
        protect_text=True,
    ),
    "wan2.1-1.3b-topk": _video(32, "topk", 0.05, 0.1, 0.15, 0.25),
    "wan2.2-a14b": _video(32, "thresholdbound", 0.5, 0.6, 0.6, 0.8, dense=12),
    "wan2.2-5b": _video(32, "thresholdbound", 0.6, 0.7, 0.7, 0.8),
    "cogvideox1.5-5b": _video(32, "topk", 0.1, 0.15, 0.15, 0.35, text=226),
    "cogvideox-5b": _video(128, "topk", 0.1, 0.15, 0.15, 0.35, text=226, rearrange="none"),
    "cogvideox-5b-4step": _video(
        128, "topk", 0.05, 0.15, 0.25, 0.5, dense=0, text=226, rearrange="none", protect_text=True
    ),
    "plug-in": PyramidConfig(),
    "qwen2.5-vl": PyramidConfig(
        shares(0.7, 0.8, 0.9, 0.9), "energybound", "antidiagonal", block_k=128, causal=True,
        text=512, similarity_caps=(0.75, 0.7, 0.7), tile=None,
    ),
})  # fmt: skip
