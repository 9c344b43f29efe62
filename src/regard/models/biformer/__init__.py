"""BiFormer: a backbone of bi-level routing attention."""

from typing import Any

from regard.core.card import Paper
from regard.models.biformer import official
from regard.models.biformer.config import BiFormerConfig
from regard.models.biformer.model import BiFormer, BiFormerBlock
from regard.models.registry import Variant
from regard.models.vision import variant

PAPER = Paper(
    "BiFormer: Vision Transformer with Bi-Level Routing Attention",
    "2303.08810", 2023, "https://github.com/rayleizhu/BiFormer", "MIT",
)  # fmt: skip
WIDE = (96, 192, 384, 768)
STL: dict[str, Any] = {
    "dims": WIDE, "depths": (2, 2, 6, 2), "mlp_ratios": (4, 4, 4, 4), "kind": "stl",
    "pos_dwconv": 0,
}  # fmt: skip
# Sizes that differ from the defaults of the config, and what is said of them.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("Bi-level routing attention, 13.1 million parameters.", {}),
    "small": (
        "Bi-level routing attention, 25.5 million parameters.",
        {"depths": (4, 4, 18, 4), "drop_path": 0.15},
    ),
    "base": (
        "Bi-level routing attention, 56.8 million parameters.",
        {"depths": (4, 4, 18, 4), "dims": WIDE},
    ),
    "stl": ("Bi-level routing attention in the frame of Swin, 28.4 million parameters.", STL),
    "stl_nchw": (
        "The same with the channels first and other borders.",
        {**STL, "layout": "nchw", "topks": (1, 4, 16, -1)},
    ),
}
VARIANTS = {
    f"biformer_{name}": Variant(
        PAPER, variant(BiFormerConfig, f"biformer_{name}", summary, **sizes), BiFormer,
        official.KEYS, measured=official.measured,
    )
    for name, (summary, sizes) in PUBLISHED.items()
}  # fmt: skip

__all__ = ["VARIANTS", "BiFormer", "BiFormerBlock", "BiFormerConfig"]
