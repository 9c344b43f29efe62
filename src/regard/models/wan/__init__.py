"""Wan: the transformer of a text-to-video model."""

from regard.core.card import Paper
from regard.models.registry import Variant
from regard.models.vision import variant
from regard.models.wan import official
from regard.models.wan.config import WanConfig
from regard.models.wan.model import Wan

PAPER = Paper(
    "Wan: Open and Advanced Large-Scale Video Generative Models",
    "2503.20314", 2025, "https://github.com/Wan-Video/Wan2.1", "Apache-2.0",
)  # fmt: skip
CONFIGS = (
    variant(WanConfig, "wan_1_3b", "Text to video, 1.3 billion parameters, for 480 x 832."),
    variant(
        WanConfig, "wan_14b", "Text to video, 14 billion parameters, for 720 x 1280.",
        heads=40, layers=40, mlp_dim=13824,
    ),
)  # fmt: skip
VARIANTS = {
    make.__name__: Variant(PAPER, make, Wan, official.KEYS, settings=official.settings)
    for make in CONFIGS
}

__all__ = ["VARIANTS", "Wan", "WanConfig"]
