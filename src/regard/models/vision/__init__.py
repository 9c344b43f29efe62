"""What vision backbones share: embeddings, blocks, stages, the classifier and its config.

Maps of tokens are [B, height, width, C] throughout; images [B, channels, height, width].
"""

from regard.models.vision.blocks import Block, DropPath, Mlp, Stage, drop_rates
from regard.models.vision.classifier import Classifier
from regard.models.vision.config import VisionConfig, variant
from regard.models.vision.embeddings import ConvStem, PatchEmbed, PatchMerging, as_map

__all__ = [
    "Block",
    "Classifier",
    "ConvStem",
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "Stage",
    "VisionConfig",
    "as_map",
    "drop_rates",
    "variant",
]
