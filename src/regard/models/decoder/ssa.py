"""The models of SSA: their configs, and how the authors lay them out.

Provenance: the `state_dict` of `LlamaNSAForCausalLM` of https://github.com/zhenyi4/ssa (MIT), which
has the names of transformers' Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard.core.checks import reject
from regard.models.decoder.config import DecoderConfig, MixerConfig
from regard.models.keys import Keys, kept, renamed, within

LAYER = (
    *within(kept(*(f"{n}_proj.weight" for n in "qkvog")), "mixer.", "self_attn."),
    *renamed(
        ("mixer_norm.weight", "input_layernorm.weight"),
        ("mlp_norm.weight", "post_attention_layernorm.weight"),
    ),
    *kept(*(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))),
)
MODEL = (
    *within(LAYER, "layers.{}.", "model.layers.{}."),
    *renamed(
        ("embed.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("head.weight", "lm_head.weight"),
    ),
)
KEYS = Keys(MODEL, {"lm_head.weight": "model.embed_tokens.weight"})

# Fields of the authors' config.json -> arguments of ours.
SIZES = {
    "hidden_size": "dim", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp_dim",
    "vocab_size": "vocabulary", "rms_norm_eps": "norm_eps", "rope_theta": "rope",
    "tie_word_embeddings": "tied", "initializer_range": "init_std", "block_size": "block",
    "block_counts": "count", "inference_mode": "mode",
}  # fmt: skip


def ssa(
    dim: int = 2048,
    layers: int = 16,
    heads: int = 32,
    kv_heads: int | None = 2,
    head_dim: int | None = None,
    block: int = 16,
    count: int = 16,
    mode: str = "sparse",
    mlp_dim: int | None = 8192,
    vocabulary: int = 128256,
    norm_eps: float = 1e-5,
    rope: float | bool = 500000.0,
    tied: bool = True,
    init_std: float = 0.02,
) -> DecoderConfig:
    """SSA: full and sparse attention with one set of weights (1.21 billion parameters).

    mode: "sparse", each query attends to `count` blocks of `block` keys, or "full". The authors'
    models called MoBA and FullAttn are this one, trained with one of the streams only.
    """
    layer = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block": block,
        "count": count, "mode": mode, "rope": rope,
    }  # fmt: skip
    mixers = (MixerConfig("ssa", layer),)
    return DecoderConfig(mixers, vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std)


def ssa_nsa(
    dim: int = 2048,
    layers: int = 16,
    heads: int = 32,
    kv_heads: int | None = 2,
    head_dim: int | None = None,
    block: int = 16,
    count: int = 16,
    window: int = 128,
    mlp_dim: int | None = 8192,
    vocabulary: int = 128256,
    norm_eps: float = 1e-5,
    rope: float | bool = 500000.0,
    tied: bool = True,
    init_std: float = 0.02,
) -> DecoderConfig:
    """The native sparse attention that SSA is compared with (1.21 billion parameters).

    window: tokens of its third branch, the query's own included.
    """
    layer = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block": block,
        "count": count, "nsa": True, "window": window, "rope": rope,
    }  # fmt: skip
    mixers = (MixerConfig("ssa", layer),)
    return DecoderConfig(mixers, vocabulary, dim, layers, mlp_dim, norm_eps, tied, init_std)


def settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ssa` from the authors' config."""
    if published.get("rope_scaling") is not None:
        accepted = "None in rope_scaling (scaled positions are not supported)"
        raise reject("create_model", "config.json", accepted, published["rope_scaling"])
    found = {ours: published[field] for field, ours in SIZES.items() if field in published}
    return {name: value for name, value in found.items() if value is not None}


def nsa_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ssa_nsa` from the authors' config."""
    found = settings(published)
    found.pop("mode", None)
    if published.get("window_size"):
        found["window"] = published["window_size"]
    return found
