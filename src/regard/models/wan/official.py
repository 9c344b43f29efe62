"""The names of the published checkpoints, which are ours, and what their `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard.core.checks import reject
from regard.models.keys import Keys, kept, within

LEAVES = ("weight", "bias")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION = kept(
    *(f"{name}.{leaf}" for name in PROJECTIONS for leaf in LEAVES),
    "norm_q.weight", "norm_k.weight",
)  # fmt: skip
BLOCK = (
    *within(ATTENTION, "attn1.", "attn1."),
    *within(ATTENTION, "attn2.", "attn2."),
    *kept(*(f"{name}.{leaf}" for name in ("norm2", "ffn.net.0.proj", "ffn.net.2")
            for leaf in LEAVES), "scale_shift_table"),
)  # fmt: skip
EMBEDDERS = ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")
OUTSIDE = (
    "patch_embedding", "proj_out",
    *(f"condition_embedder.{name}" for name in (
        *EMBEDDERS, "text_embedder.linear_1", "text_embedder.linear_2",
    )),
)  # fmt: skip
KEYS = Keys(
    (
        *within(BLOCK, "blocks.{}.", "blocks.{}."),
        *kept(*(f"{name}.{leaf}" for name in OUTSIDE for leaf in LEAVES), "scale_shift_table"),
    )
)
SIZES = {
    "num_attention_heads": "heads", "attention_head_dim": "head_dim", "num_layers": "layers",
    "ffn_dim": "mlp_dim", "in_channels": "channels", "out_channels": "channels_out",
    "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps",
}  # fmt: skip


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `WanConfig` that a published `config.json` holds.

    ValueError for a model that Wan is not: other norms, or one that takes an image.
    """
    fixed = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "image_dim": None}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise reject("create_model", f"checkpoint's {name}", repr(value), config[name])
    found = {ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config}
    if "patch_size" in config:
        found["patch"] = tuple(config["patch_size"])
    return found
