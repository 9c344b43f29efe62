"""The golden Vision Transformer: 3 layers of 3 heads on a 4 x 4 grid, and 12 images."""

from __future__ import annotations

from torch import Tensor, nn

from golden_files import parts, settings
from lens.timm_like import VisionTransformer

GOLDEN = "vit_visual_analytics/tiny_vit"


def golden_numbers() -> dict[str, dict[str, Tensor]]:
    """The parts `state`, `in` and `out`."""
    return parts(GOLDEN)


def golden_model() -> nn.Module:
    """The model with the golden weights, in evaluation mode."""
    made = VisionTransformer(**settings(GOLDEN))
    made.load_state_dict(golden_numbers()["state"])
    return made.eval()
