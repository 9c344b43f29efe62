"""The config of HaloNet."""

from __future__ import annotations

from dataclasses import dataclass

from regard.core.checks import check_choice, check_flag, check_integer, reject
from regard.models.vision import VisionConfig

ACTIVATIONS = ("relu", "silu")


@dataclass(frozen=True)
class HaloNetConfig(VisionConfig):
    """Bottleneck blocks, whose middle is a convolution or halo attention.

    stages: a letter per block: "c" a 3 x 3 convolution, "h" halo attention, "g" attention over
        the whole map of `global_side` squared tokens.
    mids, outs, strides, heads: per stage: channels within and after a block, the stride of the
        first block, heads of attention. values: channels of values over `mids`.
    block, halo, head_dim: of `regard.mixers.HaloAttention` (head_dim None: mids / heads).
    act: activation. squeeze, eca: gates of channels behind convolutions. group: channels in a
        group of the convolution (0: one group).
    stem: "tiered", three 3 x 3 convolutions to `stem_dim`, or "single", one of 7 x 7. stem_pool:
        a max pool after it; without one, the tiered stem strides twice.
    last: channels of a 1 x 1 convolution before the head, 0 for none.
    fill: maps whose sides are no multiples of the block are filled up; False refuses them.
    """

    stages: tuple[str, ...] = ("cc", "cc", "ch", "hh")
    mids: tuple[int, ...] = (64, 128, 256, 512)
    outs: tuple[int, ...] = (256, 512, 1024, 2048)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    values: float = 1.0
    block: int = 8
    halo: int = 3
    head_dim: int | None = None
    global_side: int = 8
    global_heads: int = 4
    act: str = "relu"
    squeeze: bool = False
    eca: bool = False
    group: int = 0
    stem: str = "tiered"
    stem_dim: int = 64
    stem_pool: bool = True
    last: int = 0
    fill: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        self.per_stage("mids", "outs", "strides", "heads")
        fits = isinstance(self.stages, tuple) and len(self.stages) == len(self.mids)
        if not fits or not all(
            isinstance(s, str) and s and not set(s) - set("chg") for s in self.stages
        ):
            accepted = f"{len(self.mids)} words of the letters c, h and g"
            raise reject(op, "stages", accepted, self.stages)
        for name in ("block", "global_side", "global_heads", "stem_dim"):
            check_integer(op, name, getattr(self, name))
        for name in ("halo", "group", "last"):
            check_integer(op, name, getattr(self, name), least=0)
        check_choice(op, "act", self.act, ACTIVATIONS)
        check_choice(op, "stem", self.stem, ("tiered", "single"))
        for name in ("squeeze", "eca", "stem_pool", "fill"):
            check_flag(op, name, getattr(self, name))
        if self.squeeze and self.eca:
            raise reject(op, "eca", "False with squeeze=True", self.eca)
