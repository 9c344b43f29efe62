"""Published models by name, built from configs, with their authors' checkpoints.

`names()` lists them, `published[name]` tells where one comes from, `regard.create_model(name)`
makes it. A folder is a family: `Decoder` holds all language models, with the mixer of every layer
chosen by a config.
"""

from regard.models.decoder import Decoder, DecoderConfig, MixerConfig, generate
from regard.models.pretrained import Pretrained
from regard.models.registry import Variant, create_model, names, published

__all__ = [
    "Decoder",
    "DecoderConfig",
    "MixerConfig",
    "Pretrained",
    "Variant",
    "create_model",
    "generate",
    "names",
    "published",
]
