"""The names of the authors' checkpoints, which hold the tensors under `model`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regard.models.keys import Entry, Keys, kept, within

STAGES = 8  # as many as any config may have
LEAVES = ("weight", "bias")


def _both(*names: str) -> tuple[Entry, ...]:
    return kept(*(f"{name}.{leaf}" for name in names for leaf in LEAVES))


def _batch_norm(name: str) -> tuple[Entry, ...]:
    running = ("running_mean", "running_var", "num_batches_tracked")
    return *_both(name), *kept(*(f"{name}.{leaf}" for leaf in running))


BLOCK = (
    *_both("cpe.0.proj", "cpe.1.proj", "norm1", "norm2", "norm3", "attn.qkv", "attn.proj"),
    *kept("attn.temperature"),
    *_both("local_mp.conv1", "local_mp.conv2", "mlp.fc1", "mlp.fc2"),
    *_batch_norm("local_mp.bn"),
)
STEM = (
    *_both("norm"),
    *within((*_both("0", "3"), *_batch_norm("1"), *_batch_norm("4")), "proj.", "proj.proj."),
)


def _stage(stage: int) -> tuple[Entry, ...]:
    embed = _both("norm", "proj") if stage else STEM
    return (
        *within(BLOCK, f"stages.{stage}.blocks.{{}}.", f"stages.{stage}.{{}}."),
        *within(embed, f"stages.{stage}.embed.", f"downsample_layers.{stage}."),
        *within(_both(""), f"norms.{stage}", f"norm{stage}"),
    )


KEYS = Keys(
    (*(entry for stage in range(STAGES) for entry in _stage(stage)), *_both("norm", "head"))
)


def measured(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Depths, and classes or that there is no head."""
    depths: dict[int, int] = {}
    for name in tensors:
        match = re.match(r"stages\.(\d+)\.(\d+)\.", name)
        if match is not None:
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    if sorted(depths) != list(range(len(depths))) or not depths:
        return {}
    found: dict[str, Any] = {"depths": tuple(depths[stage] for stage in range(len(depths)))}
    head = tensors.get("head.weight")
    if head is not None:
        found["classes"] = len(head)
    elif "norm0.weight" in tensors:
        found["features_only"] = True
    return found
