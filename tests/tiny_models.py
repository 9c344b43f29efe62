"""Small models of transformers with random weights, built from configs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


def _made(model: Any, seed: int = 0) -> Any:
    """Weights large enough that attention is far from uniform."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith(("sinks", "class_embedding")):
                noise = torch.randn(parameter.shape, generator=made)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * 1.5)
    return model.eval()


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument: releases differ in its name."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


TEXT = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def decoder(kind: str = "Llama", implementation: str = "eager", **options: Any) -> Any:
    """Llama, Mistral (window of 4), Qwen2, Gemma2 (softcap and windows) or GptOss (sinks)."""
    given = {**TEXT, **options}
    if kind == "Mistral":
        given.setdefault("sliding_window", 4)
    if kind == "Gemma2":
        given |= {"sliding_window": 4, "head_dim": 8, "attn_logit_softcapping": 2.0}
    if kind == "GptOss":
        given |= {"sliding_window": 4, "head_dim": 8, "num_local_experts": 2}
        given |= {"num_experts_per_tok": 1}
    config = getattr(transformers, f"{kind}Config")(**given, attn_implementation=implementation)
    return _made(getattr(transformers, f"{kind}ForCausalLM")(config))


def bert(implementation: str = "eager") -> Any:
    config = transformers.BertConfig(
        vocab_size=70,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        attn_implementation=implementation,
    )
    return _made(transformers.BertModel(config))


def albert(implementation: str = "eager") -> Any:
    config = transformers.AlbertConfig(
        vocab_size=70,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        attn_implementation=implementation,
    )
    return _made(transformers.AlbertModel(config))


def vit(kind: str = "Dinov2", implementation: str = "eager") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=28,
        patch_size=7,
        attn_implementation=implementation,
    )
    return _made(getattr(transformers, f"{kind}Model")(config))


def whisper(implementation: str = "eager") -> Any:
    config = transformers.WhisperConfig(
        vocab_size=70,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        attn_implementation=implementation,
    )
    return _made(transformers.WhisperForConditionalGeneration(config))


def llava(implementation: str = "eager", vision: dict | None = None, **text: Any) -> Any:
    """16 image tokens (id 65) per image of 28 x 28; CLIP with 3 layers unless told."""
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7, "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**tower, **(vision or {})}),
        text_config=transformers.LlamaConfig(**{**TEXT, **text}),
        image_token_id=65,
        attn_implementation=implementation,
    )
    return _made(transformers.LlavaForConditionalGeneration(config))
