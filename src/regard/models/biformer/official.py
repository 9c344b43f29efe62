"""The names of the authors' checkpoints, which hold the tensors under `model`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regard.models.keys import Entry, Keys, kept, within

LEAVES = ("weight", "bias")
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def _all(*names: str) -> tuple[Entry, ...]:
    return kept(*(f"{name}.{leaf}" for name in names for leaf in LEAVES))


ROUTED = ("attn.qkv.qkv", "attn.wo", "attn.lepe", "attn.qkv_linear", "attn.output_linear")
BLOCK = (
    *_all("pos_embed", "norm1", "norm2", *ROUTED, "attn.router.emb"),
    *_all("attn.qkv", "attn.proj", "attn.1", "attn.2", "attn.3"),
    *_all("mlp.0", "mlp.1.dwconv", "mlp.2", "mlp.3"),
    *kept("gamma1", "gamma2"),
)
KEYS = Keys(
    (
        *within(BLOCK, "stages.{}.{}.", "stages.{}.{}."),
        *within(BLOCK, "stages.{}.blocks.{}.", "stages.{}.blocks.{}."),
        *kept(*(f"downsample_layers.{{}}.{{}}.{leaf}" for leaf in (*LEAVES, *RUNNING))),
        *kept(*(f"norm.{leaf}" for leaf in (*LEAVES, *RUNNING))),
        *_all("head"),
    )
)


def measured(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Depths, and the number of classes or that there is no head."""
    depths: dict[int, int] = {}
    for name in tensors:
        match = re.match(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.", name)
        if match is not None:
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    if not depths or sorted(depths) != list(range(len(depths))):
        return {}
    found: dict[str, Any] = {"depths": tuple(depths[stage] for stage in range(len(depths)))}
    head = tensors.get("head.weight")
    return {**found, **({"features_only": True} if head is None else {"classes": len(head)})}
