"""Configs of the four InLine families."""

from __future__ import annotations

import re
from dataclasses import dataclass

from regard.core.checks import check_choice, check_flag, check_integer, reject
from regard.models.vision import VisionConfig
from regard.ops.inline import FEATURE_MAPS


@dataclass(frozen=True)
class InlineConfig(VisionConfig):
    """What the families share.

    image_size: the side for which the model is made; where positions are not learned, it runs at
        others. feature_map: of InLine attention.
    """

    image_size: int = 224
    patch_size: int = 4
    qkv_bias: bool = True
    feature_map: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        check_integer(op, "image_size", self.image_size)
        check_integer(op, "patch_size", self.patch_size)
        if self.image_size % self.patch_size:
            accepted = f"a multiple of patch_size, {self.patch_size}"
            raise reject(op, "image_size", accepted, self.image_size)
        check_flag(op, "qkv_bias", self.qkv_bias)
        check_choice(op, "feature_map", self.feature_map, FEATURE_MAPS)


@dataclass(frozen=True)
class InlineDeiTConfig(InlineConfig):
    """A column of equal blocks with a class token.

    >>> InlineDeiTConfig().side
    14
    """

    patch_size: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "depth", "heads"):
            check_integer(type(self).__name__, name, getattr(self, name))

    @property
    def side(self) -> int:
        """Tokens along a side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class InlinePyramidConfig(InlineConfig):
    """Stages of blocks, each on a smaller map.

    attention: a letter per stage, I for InLine, S for softmax, M for both; the digits after the
        letters say how many of the first blocks of each M are InLine: "IIMS2".

    >>> config = InlinePyramidConfig(attention="IIMS2")
    >>> config.inline(1, 0), config.inline(2, 1), config.inline(2, 2), config.inline(3, 0)
    (True, True, False, False)
    """

    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    attention: str = "IIIS"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        self.per_stage("dims", "depths", "heads", "mlp_ratios")
        stages = len(self.dims)
        match = re.fullmatch(r"([ISM]+)(\d*)", str(self.attention))
        letters, digits = match.groups() if match else ("", "")
        if len(letters) != stages or len(digits) != letters.count("M"):
            accepted = f"{stages} letters of I, S, M and a digit for every M"
            raise reject(op, "attention", accepted, self.attention)

    def inline(self, stage: int, block: int) -> bool:
        """Whether this block has InLine attention."""
        letter = self.attention[stage]
        if letter != "M":
            return letter == "I"
        mixed = self.attention[:stage].count("M")
        return block < int(self.attention[len(self.dims) + mixed])

    def side(self, stage: int) -> int:
        """Tokens along a side of the map of a stage."""
        side = self.image_size // self.patch_size
        for _ in range(stage):
            side = -(-side // 2)
        return side


@dataclass(frozen=True)
class InlinePVTConfig(InlinePyramidConfig):
    """A learned position per stage, and convolutions between stages.

    reductions: by how much the keys of a softmax block are fewer along a side, per stage.
    """

    dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (2, 4, 10, 16)
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    attention: str = "IIII"
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    drop_path: float = 0.1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.per_stage("dims", "reductions")


@dataclass(frozen=True)
class InlineSwinConfig(InlinePyramidConfig):
    """Global attention first, then windows that are shifted in every other block.

    window: of InLine blocks, side in tokens; a map that is not larger is one window. Softmax
        blocks have windows of an eighth of it, at least 7.
    """

    window: int = 56
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(type(self).__name__, "window", self.window)


@dataclass(frozen=True)
class InlineCSwinConfig(InlinePyramidConfig):
    """InLine blocks on whole maps, softmax blocks in crossing stripes.

    stripes: width of the stripes of softmax blocks, per stage; those of the last stage, and of a
        stage whose map has that side, attend to the whole map instead.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 4, 18, 1)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    attention: str = "IISS"
    stripes: tuple[int, ...] = (1, 2, 7, 7)
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        self.per_stage("dims", "stripes")
        for stage, heads in enumerate(self.heads):
            halved = not (self.whole(stage) or self.attention[stage] == "I")
            if halved and heads % 2:
                raise reject(op, "heads", "even where stripes cross", self.heads)
            if halved and self.side(stage) % self.stripes[stage]:
                accepted = f"divisors of the sides of the maps, here {self.side(stage)}"
                raise reject(op, "stripes", accepted, self.stripes)

    def whole(self, stage: int) -> bool:
        """Whether the softmax blocks of a stage see the whole map."""
        return stage == len(self.dims) - 1 or self.side(stage) == self.stripes[stage]
