"""InLine backbones: vision transformers whose first stages attend globally in linear time."""

from typing import Any

from regard.core.card import Paper
from regard.models.inline import official
from regard.models.inline.config import (
    InlineCSwinConfig,
    InlineDeiTConfig,
    InlinePVTConfig,
    InlineSwinConfig,
)
from regard.models.inline.model import InlineCSwin, InlineDeiT, InlinePVT, InlineSwin
from regard.models.registry import Variant
from regard.models.vision import variant

PAPER = Paper(
    "Bridging the Divide: Reconsidering Softmax and Linear Attention",
    "2412.06590", 2024, "https://github.com/LeapLabTHU/InLine",
)  # fmt: skip
FAMILIES = {
    "deit": (InlineDeiTConfig, InlineDeiT, official.DEIT, official.measured_deit),
    "pvt": (InlinePVTConfig, InlinePVT, official.PVT, official.measured_pyramid),
    "swin": (InlineSwinConfig, InlineSwin, official.SWIN, official.measured_pyramid),
    "cswin": (InlineCSwinConfig, InlineCSwin, official.CSWIN, official.measured_pyramid),
}
LARGE_SWIN: dict[str, Any] = {
    "dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32),
    "attention": "IIMS2", "drop_path": 0.5,
}  # fmt: skip
# Sizes that differ from the defaults of the family's config.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deit_tiny": {},
    "deit_small": {"image_size": 288, "dim": 320, "heads": 10},
    "deit_base": {"image_size": 448, "dim": 384, "heads": 12},
    "pvt_tiny": {},
    "pvt_small": {"depths": (3, 4, 6, 3)},
    "pvt_medium": {"depths": (3, 4, 18, 3), "drop_path": 0.3},
    "pvt_large": {"depths": (3, 8, 27, 3), "drop_path": 0.3},
    "swin_tiny": {},
    "swin_small": {"depths": (2, 2, 18, 2), "attention": "IISS", "drop_path": 0.3},
    "swin_base": LARGE_SWIN,
    "swin_base_384": {**LARGE_SWIN, "image_size": 384, "window": 96},
    "cswin_tiny": {},
    "cswin_small": {"depths": (3, 6, 29, 2), "drop_path": 0.4},
    "cswin_base": {
        "dims": (96, 192, 384, 768), "depths": (3, 6, 29, 2), "heads": (4, 8, 16, 32),
        "drop_path": 0.5,
    },
}  # fmt: skip


def _variant(name: str, sizes: dict[str, Any]) -> Variant:
    family, _, size = name.partition("_")
    config, model, keys, measured = FAMILIES[family]
    title = f"{model.__name__.removeprefix('Inline')} {size.replace('_', ' at ')}"
    meaning = config.__doc__.split("\n", 1)[0]
    summary = f"InLine {title}: {meaning[0].lower()}{meaning[1:]}"
    function = variant(config, f"inline_{name}", summary, **sizes)
    return Variant(PAPER, function, model, keys, measured=measured)


VARIANTS = {f"inline_{name}": _variant(name, sizes) for name, sizes in PUBLISHED.items()}

__all__ = [
    "VARIANTS",
    "InlineCSwin",
    "InlineCSwinConfig",
    "InlineDeiT",
    "InlineDeiTConfig",
    "InlinePVT",
    "InlinePVTConfig",
    "InlineSwin",
    "InlineSwinConfig",
]
