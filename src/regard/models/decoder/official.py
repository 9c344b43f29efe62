"""How flash-linear-attention lays out MesaNet and Parallax: names of tensors, fields of configs.

Provenance: the `state_dict` of `MesaNetForCausalLM` and `ParallaxForCausalLM` of
https://github.com/fla-org/flash-linear-attention (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.core.checks import reject
from regard.models.keys import Entry, Form, Keys, kept, renamed, within


def _join_convolutions(parts: Any, shape: torch.Size) -> Tensor:
    """Two kernels [C, 1, size], whose last tap is the present token, as one [2 C, size]."""
    return torch.cat(list(parts))[:, 0].flip(1)


def _split_convolutions(tensor: Tensor) -> tuple[Tensor, ...]:
    q, k = tensor.flip(1)[:, None].chunk(2)
    return q, k


CONVOLUTIONS = Form(_join_convolutions, _split_convolutions)
CONVOLUTION_BIASES = Form(lambda parts, shape: torch.cat(list(parts)), lambda t: t.chunk(2))
FLAT = Form(lambda parts, shape: parts[0].view(shape), lambda tensor: (tensor.flatten(),))

LAYER = (
    *kept(*(f"{n}_proj.{leaf}" for n in "qkv" for leaf in ("weight", "bias"))),
    *kept("o_proj.weight", "g_proj.weight", "o_norm.weight", "q_norm.weight", "k_norm.weight"),
    *renamed(
        ("operands.r.weight", "r_proj.weight"),
        ("operands.r.bias", "r_proj.bias"),
        ("operands.r.norm.weight", "r_norm.weight"),
        ("operands.log_decay.weight", "a_proj.weight"),
        ("operands.log_decay.bias", "a_proj.bias"),
        ("operands.beta.weight", "b_proj.weight"),
        ("operands.beta.bias", "b_proj.bias"),
    ),
    Entry("log_ridge", ("lambda_params",), FLAT),
    Entry("short_conv.weight", ("q_conv1d.weight", "k_conv1d.weight"), CONVOLUTIONS),
    Entry("short_conv.bias", ("q_conv1d.bias", "k_conv1d.bias"), CONVOLUTION_BIASES),
)
BLOCK = (
    *within(LAYER, "mixer.", "attn."),
    *renamed(("mixer_norm.weight", "attn_norm.weight")),
    *kept("mlp_norm.weight", *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))),
)
MODEL = (
    *within(BLOCK, "layers.{}.", "model.layers.{}."),
    *renamed(
        ("embed.weight", "model.embeddings.weight"),
        ("norm.weight", "model.norm.weight"),
        ("head.weight", "lm_head.weight"),
    ),
)

LAYER_KEYS = Keys(LAYER)
KEYS = Keys(MODEL, {"lm_head.weight": "model.embeddings.weight"})

# Fields of the authors' config.json -> arguments of ours.
SIZES = {
    "hidden_size": "dim", "num_hidden_layers": "layers", "num_heads": "heads",
    "intermediate_size": "mlp_dim", "vocab_size": "vocabulary", "norm_eps": "norm_eps",
    "tie_word_embeddings": "tied", "initializer_range": "init_std",
}  # fmt: skip
MESANET_SIZES = {
    **SIZES, "head_dim": "head_dim", "conv_size": "short_conv", "conv_bias": "conv_bias",
    "use_output_gate": "output_gate", "lambda_lower_bound": "least_ridge",
}  # fmt: skip
PARALLAX_SIZES = {
    **SIZES, "num_kv_heads": "kv_heads", "qkv_bias": "bias", "qk_norm": "qk_norm",
    "window_size": "window", "rope_theta": "rope",
}  # fmt: skip


def mesanet_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `config.mesanet` from the authors' config."""
    found = _settings(published, "mesa_net", MESANET_SIZES)
    hybrid = published.get("attn")
    if not hybrid:
        return found
    if hybrid.get("qkv_bias"):
        accepted = "False in attn.qkv_bias (attention layers have no bias)"
        raise reject("create_model", "config.json", accepted, hybrid["qkv_bias"])
    attention = {"heads": hybrid["num_heads"], "rope": hybrid.get("rope_theta", 1e4)}
    if hybrid.get("num_kv_heads") is not None:
        attention["kv_heads"] = hybrid["num_kv_heads"]
    if hybrid.get("window_size") is not None:
        attention["options"] = {"window": (hybrid["window_size"] - 1, 0)}
    return {**found, "attention_layers": hybrid["layers"], "attention": attention}


def parallax_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `config.parallax` from the authors' config."""
    if published.get("attnres_block_size") is not None:
        accepted = "None in attnres_block_size (attention over residuals is not supported)"
        raise reject("create_model", "config.json", accepted, published["attnres_block_size"])
    return _settings(published, "parallax", PARALLAX_SIZES)


def _settings(published: Mapping[str, Any], kind: str, names: Mapping[str, str]) -> dict[str, Any]:
    if published.get("model_type", kind) != kind:
        accepted = f"{kind!r} in model_type"
        raise reject("create_model", "config.json", accepted, published["model_type"])
    if published.get("hidden_act", "swish") not in ("swish", "silu"):
        accepted = "'swish' in hidden_act"
        raise reject("create_model", "config.json", accepted, published["hidden_act"])
    found = {ours: published[field] for field, ours in names.items() if field in published}
    ratio = published.get("hidden_ratio")
    if found.get("mlp_dim") is None and ratio not in (None, 4):
        wide = int(published["hidden_size"] * ratio * 2 / 3)
        found["mlp_dim"] = -(-wide // 256) * 256
    return found
