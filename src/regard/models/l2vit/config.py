"""The config of L2ViT."""

from __future__ import annotations

from dataclasses import dataclass

from regard.core.checks import check_choice, check_flag, check_integer, check_number, reject
from regard.models.vision import VisionConfig

KINDS = ("mixed", "local", "global")


@dataclass(frozen=True)
class L2ViTConfig(VisionConfig):
    """Window attention and linear global attention in turn.

    blocks: "mixed": even blocks of a stage attend in windows, odd ones globally; "local",
        "global": all alike. window: its side in tokens. minimum: of the sum of weights.
    features_only: no head; the output is the map after every stage, normalised, as detectors and
        segmenters take it.

    >>> config = L2ViTConfig()
    >>> [config.local(block) for block in range(3)]
    [True, False, True]
    """

    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    blocks: str = "mixed"
    window: int = 7
    minimum: float = 100.0
    qkv_bias: bool = True
    features_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        self.per_stage("dims", "depths", "heads", "mlp_ratios")
        if self.dims[0] % 2:
            raise reject(op, "dims", "even at first, as the stem begins with half of it", self.dims)
        check_choice(op, "blocks", self.blocks, KINDS)
        check_integer(op, "window", self.window)
        check_number(op, "minimum", self.minimum, least=0.0)
        for name in ("qkv_bias", "features_only"):
            check_flag(op, name, getattr(self, name))

    def local(self, block: int) -> bool:
        """Whether a block of a stage attends in windows."""
        return self.blocks == "local" or (self.blocks == "mixed" and block % 2 == 0)
