"""A tiny model of every kind, with inputs of several paddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tiny_models as tiny

IDS = torch.tensor([[9, 6, 4, 11, 28, 10, 17, 14, 26], [9, 5, 33, 41, 12, 50, 7, 8, 60]])
DECODERS = ("Llama", "Mistral", "Qwen2", "Gemma2", "GptOss")
KINDS = (*DECODERS, "bert", "albert", "ViT", "Dinov2", "whisper", "llava", "t5")


def padded(side: str, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Three tokens of the first row are padding, on one side or none."""
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, : 3 if side == "left" else None] = 0
        if side == "right":
            mask[0] = 1
            mask[0, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=70, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=2,
        num_heads=4, decoder_start_token_id=0, dropout_rate=0.0, attn_implementation="eager",
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def case(kind: str, side: str, implementation: str = "eager") -> tuple[Any, dict[str, Any]]:
    """A model and a batch for it."""
    made = torch.Generator().manual_seed(1)
    if kind in ("bert", "albert"):
        return getattr(tiny, kind)(implementation), padded(side)
    if kind in ("ViT", "Dinov2"):
        pixels = torch.randn(2, 3, 28, 28, generator=made)
        return tiny.vit(kind, implementation), {"pixel_values": pixels}
    if kind == "whisper":
        features = torch.randn(2, 8, 40, generator=made)
        text = {f"decoder_{name}": x for name, x in padded(side).items()}
        return tiny.whisper(implementation), {"input_features": features, **text}
    if kind == "llava":
        rows = [[1, 5, *[65] * 16, 9, 10, 7], [8, 1, *[65] * 16, 4, 3, 2]]
        text = padded("none", torch.tensor(rows))
        if side == "left":
            text["attention_mask"][0, :1] = 0
        if side == "right":
            text["attention_mask"][0, -2:] = 0
        return tiny.llava(implementation), {
            **text, "pixel_values": torch.randn(2, 3, 28, 28, generator=made),
        }  # fmt: skip
    if kind == "t5":
        return t5(), {**padded(side), "decoder_input_ids": IDS[:, :5]}
    return tiny.decoder(kind, implementation), padded(side)


def output(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    """Logits or last hidden states of the real tokens."""
    with torch.no_grad():
        found = model(**inputs, **more)
    values = found.logits if "logits" in found else found[0]
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is None or ("pixel_values" in inputs and mask.shape != values.shape[:2]):
        return values
    if "decoder_input_ids" in inputs and "decoder_attention_mask" not in inputs:
        return values
    return values[mask.bool()]
