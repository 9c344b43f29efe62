"""The decoder: one model for all language models, with the mixer of every layer in its config."""

from regard.core.card import Paper
from regard.models.decoder import official, official_rat, ssa
from regard.models.decoder.config import (
    DecoderConfig,
    MixerConfig,
    mesanet,
    parallax,
    rat,
    rat_attention,
    rat_hybrid,
    rat_rnn,
)
from regard.models.decoder.generation import generate
from regard.models.decoder.model import Decoder
from regard.models.registry import Variant

FLA = "https://github.com/fla-org/flash-linear-attention"
RAT = Paper(
    "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling",
    "2507.04416", 2025, "https://github.com/CLAIRE-Labo/RAT", "MIT",
)  # fmt: skip
SSA = Paper(
    "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space",
    "2511.20102", 2025, "https://github.com/zhenyi4/ssa", "MIT",
)  # fmt: skip

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
    **{
        config.__name__: Variant(RAT, config, Decoder, official_rat.KEYS, measured=measured)
        for config, measured in (
            (rat, official_rat.measured_rat),
            (rat_attention, official_rat.measured),
            (rat_hybrid, official_rat.measured_hybrid),
            (rat_rnn, official_rat.measured),
        )
    },
    "ssa": Variant(SSA, ssa.ssa, Decoder, ssa.KEYS, ssa.settings),
    "ssa_nsa": Variant(SSA, ssa.ssa_nsa, Decoder, ssa.KEYS, ssa.nsa_settings),
}  # fmt: skip

__all__ = ["VARIANTS", "Decoder", "DecoderConfig", "MixerConfig", "generate"]
