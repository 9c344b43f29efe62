"""HaloNet: bottleneck networks with halo attention, of the paper and of timm."""

from typing import Any

from regard.core.card import Paper
from regard.models.halonet import official
from regard.models.halonet.config import HaloNetConfig
from regard.models.halonet.model import HaloNet
from regard.models.registry import Variant
from regard.models.vision import variant

PAPER = Paper(
    "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    "2103.12731", 2021, "https://github.com/huggingface/pytorch-image-models", "Apache-2.0",
)  # fmt: skip
MIDS = (64, 128, 256, 512)


def _paper(
    block: int, halo: int, values: float, outs: float, third: int, last: int
) -> dict[str, Any]:
    """One row of the paper's table: its ratios of values and outputs, and the third depth."""
    return {
        "stages": ("hhh", "hhh", "h" * third, "hhh"), "mids": MIDS,
        "outs": tuple(round(mid * outs) for mid in MIDS), "heads": (4, 8, 8, 8),
        "values": values, "block": block, "halo": halo, "stem": "single", "last": last,
    }  # fmt: skip


H = {
    "h0": (5.5, _paper(8, 3, 1.0, 0.5, 7, 0)),
    "h1": (8.1, _paper(8, 3, 1.0, 1.0, 10, 0)),
    "h2": (9.4, _paper(8, 3, 1.0, 1.25, 11, 0)),
    "h3": (11.8, _paper(10, 3, 1.0, 1.5, 12, 1024)),
    "h4": (19.1, _paper(12, 2, 1.0, 3.0, 12, 1280)),
    "h5": (30.7, _paper(14, 2, 2.5, 2.0, 23, 1536)),
    "h6": (43.4, _paper(8, 4, 3.0, 2.75, 24, 1536)),
    "h7": (67.4, _paper(10, 3, 4.0, 3.5, 26, 2048)),
}
# Sizes that differ from the defaults of the config, and what is said of them.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"halonet_{name}": (f"The paper's {name.upper()}, {millions} million parameters.", sizes)
        for name, (millions, sizes) in H.items()
    },
    "halonet26t": ("The smallest of timm, halo attention in three blocks.", {"halo": 2}),
    "sehalonet33ts": (
        "Of timm, with gates of channels behind convolutions.",
        {
            "stages": ("cc", "cch", "cch", "hh"), "outs": (256, 512, 1024, 1536), "act": "silu",
            "squeeze": True, "last": 1280, "stem_pool": False,
        },
    ),
    "halonet50ts": (
        "Of timm, with 50 layers.",
        {
            "stages": ("ccc", "ccch", "chchch", "chc"), "act": "silu", "heads": (8, 4, 8, 8),
        },
    ),
    "halo2botnet50ts_256": (
        "Of timm, its last attention over the whole map, for images of 256 pixels.",
        {
            "stages": ("ccc", "chch", "chchch", "cgc"), "act": "silu", "stem_pool": False,
        },
    ),
    "eca_halonext26ts": (
        "Of timm, with grouped convolutions and local gates of channels.",
        {"halo": 2, "act": "silu", "eca": True, "group": 16, "head_dim": 16},
    ),
}  # fmt: skip
VARIANTS = {
    name: Variant(
        PAPER, variant(HaloNetConfig, name, summary, **sizes), HaloNet, official.KEYS,
        measured=official.measured,
    )
    for name, (summary, sizes) in PUBLISHED.items()
}  # fmt: skip

__all__ = ["VARIANTS", "HaloNet", "HaloNetConfig"]
