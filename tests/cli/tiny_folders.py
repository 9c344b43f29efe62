"""Folders of small random models of transformers, and inputs for them."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat", ".")


def _tokenizer(folder: Path, transformers: Any) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def text_classifier(folder: Path, transformers: Any) -> Path:
    """A BERT of 2 layers and 2 heads with three classes."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
        **sizes,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    _tokenizer(folder, transformers)
    return folder


def language_model(folder: Path, transformers: Any) -> Path:
    """A Llama of 2 layers, 4 query heads and 2 key heads."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), intermediate_size=16, num_key_value_heads=2, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder, transformers)
    return folder


def vision_classifier(folder: Path, transformers: Any, kind: str = "ViT") -> Path:
    """A ViT of 2 layers and 3 heads on a 4 x 4 grid, or a Swin."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    if kind == "Swin":
        sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    config = getattr(transformers, f"{kind}Config")(
        image_size=16, patch_size=4, num_labels=5, **sizes
    )
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(folder)
    processor(transformers, 16).save_pretrained(folder)
    return folder


def convolutional_classifier(folder: Path, transformers: Any) -> Path:
    """A ResNet of two stages: a model without attention."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    processor(transformers, 16).save_pretrained(folder)
    return folder


def processor(transformers: Any, size: int) -> Any:
    """An image processor that needs no torchvision."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would recommend torchvision
    try:
        return transformers.ViTImageProcessor(size={"height": size, "width": size})
    finally:
        logging.set_verbosity(level)


def speech_model(folder: Path, transformers: Any) -> Path:
    """A Whisper of 1 + 1 layers that sees one second."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=20, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_source_positions=50, max_target_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(folder)
    return folder


def picture(path: Path, seed: int = 0) -> Path:
    """A PNG file of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (20, 30, 3))
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def recording(path: Path, rate: int = 8000) -> Path:
    """A WAV file of half a second: two channels of a rising tone."""
    time = np.arange(rate // 2) / rate
    samples = (20000 * np.sin(2 * np.pi * (200 + 400 * time) * time)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples, 2).tobytes())
    return path
