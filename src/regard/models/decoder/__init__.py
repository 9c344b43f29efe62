"""The decoder: one model for all language models, with the mixer of every layer in its config."""

from regard.core.card import Paper
from regard.models.decoder import official
from regard.models.decoder.config import DecoderConfig, MixerConfig, mesanet, parallax
from regard.models.decoder.generation import generate
from regard.models.decoder.model import Decoder
from regard.models.registry import Variant

FLA = "https://github.com/fla-org/flash-linear-attention"

VARIANTS = {
    "mesanet": Variant(
        Paper(
            "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
            "2506.05233", 2025, FLA, "MIT",
        ),
        mesanet, Decoder, official.KEYS, official.mesanet_settings,
    ),
    "parallax": Variant(
        Paper(
            "Parallax: Parameterized Local Linear Attention for Language Modeling",
            "2605.29157", 2026, FLA, "MIT",
        ),
        parallax, Decoder, official.KEYS, official.parallax_settings,
    ),
}  # fmt: skip

__all__ = ["VARIANTS", "Decoder", "DecoderConfig", "MixerConfig", "generate"]
