"""L2ViT: local window attention and linear global attention in turn."""

from typing import Any

from regard.core.card import Paper
from regard.models.l2vit import official
from regard.models.l2vit.config import L2ViTConfig
from regard.models.l2vit.model import L2ViT, LGABlock, LWABlock
from regard.models.registry import Variant
from regard.models.vision import variant

PAPER = Paper(
    "The Linear Attention Resurrection in Vision Transformer",
    "2501.16182", 2025, "https://github.com/ChuanyangZheng/L2ViT", "MIT",
)  # fmt: skip
BASE: dict[str, Any] = {
    "dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32),
    "drop_path": 0.3,
}  # fmt: skip
# Sizes that differ from the defaults of the config, and what is said of them.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("Window and linear global attention in turn, 28.6 million parameters.", {}),
    "small": (
        "Window and linear global attention in turn, 50.2 million parameters.",
        {"depths": (2, 2, 18, 2)},
    ),
    "base": ("Window and linear global attention in turn, 88.6 million parameters.", BASE),
    "base_384": (
        "The base model with windows of 12 x 12 tokens, for images of 384 pixels.",
        {**BASE, "window": 12},
    ),
}
VARIANTS = {
    f"l2vit_{name}": Variant(
        PAPER, variant(L2ViTConfig, f"l2vit_{name}", summary, **sizes), L2ViT, official.KEYS,
        measured=official.measured,
    )
    for name, (summary, sizes) in PUBLISHED.items()
}  # fmt: skip

__all__ = ["VARIANTS", "L2ViT", "L2ViTConfig", "LGABlock", "LWABlock"]
