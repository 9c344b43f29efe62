"""Small decoders that the tests of the models share."""

from __future__ import annotations

import torch

from regard.core.budgets import budget, relative_error
from regard.models import Decoder, DecoderConfig, MixerConfig

VOCABULARY, DIM = 23, 16
GQA = {"heads": 4, "kv_heads": 2}
ALL = {**GQA, "qk_norm": True, "rope": True, "short_conv": 3, "output_gate": True}
# One decoder, whatever mixes.
MIXERS = {
    "softmax": MixerConfig("attention", {**GQA, "rope": True}),
    "window": MixerConfig("attention", {**GQA, "rope": True, "options": {"window": (3, 0)}}),
    "linear": MixerConfig("attention", {**ALL, "mechanism": "linear"}),
    "gated_delta": MixerConfig("attention", {**ALL, "mechanism": "gated_delta"}),
    "attention with local_linear": MixerConfig("attention", {**ALL, "mechanism": "local_linear"}),
    "hedgehog": MixerConfig("hedgehog", {**GQA, "rope": True}),
    "hedgehog window": MixerConfig("hedgehog", {**GQA, "rope": True, "window_length": 3}),
    "local_linear": MixerConfig("local_linear", {**GQA, "rope": 500.0, "forget_gate": True}),
    "mesa": MixerConfig("mesa", {**GQA, "short_conv": 3, "conv_bias": True, "output_gate": True}),
    "parallax": MixerConfig("parallax", {**GQA, "rope": True, "bias": True}),
    "rat": MixerConfig("rat", {"heads": 4, "chunk_length": 3}),
    "gated_rnn": MixerConfig("gated_rnn", {"longest": 6}),
    "ssa": MixerConfig("ssa", {**GQA, "block": 3, "count": 2}),
}


def config_of(*names: str, **settings) -> DecoderConfig:
    mixers = tuple(MIXERS[name] for name in names)
    sizes = {"vocabulary": VOCABULARY, "dim": DIM, "layers": 2, "mlp_dim": 24, "init_std": 0.3}
    return DecoderConfig(mixers, **{**sizes, **settings})


def decoder(*names: str, dtype: torch.dtype = torch.float64, **settings) -> Decoder:
    """A model in which no gain, bias or head parameter is at its start."""
    torch.manual_seed(0)
    model = Decoder(config_of(*names, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, shape, generator=generator)


def check_close(actual: torch.Tensor, expected: torch.Tensor, quantity="value") -> None:
    error = relative_error(actual, expected)
    assert error <= budget(actual.dtype, quantity), f"relative error {error:.3g}"
