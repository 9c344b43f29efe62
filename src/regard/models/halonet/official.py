"""The names of timm's checkpoints, which are ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regard.models.keys import Entry, Keys, kept, within

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _norm(name: str) -> tuple[Entry, ...]:
    return kept(*(f"{name}.{leaf}" for leaf in NORM))


def _conv(name: str) -> tuple[Entry, ...]:
    return *kept(f"{name}.conv.weight"), *_norm(f"{name}.bn")


BLOCK = (
    *(
        entry
        for name in ("shortcut", "conv1_1x1", "conv2_kxk", "conv3_1x1")
        for entry in _conv(name)
    ),
    *_norm("post_attn"),
    *kept("self_attn.q.weight", "self_attn.kv.weight", "self_attn.qkv.weight"),
    *kept("self_attn.pos_embed.height_rel", "self_attn.pos_embed.width_rel"),
    *kept("attn.fc1.weight", "attn.fc1.bias", "attn.fc2.weight", "attn.fc2.bias"),
    *kept("attn.conv.weight"),
)
KEYS = Keys(
    (
        *(entry for name in ("conv1", "conv2", "conv3", "conv") for entry in _conv(f"stem.{name}")),
        *within(BLOCK, "stages.{}.{}.", "stages.{}.{}."),
        *_conv("final_conv"),
        *kept("head.fc.weight", "head.fc.bias"),
    )
)


def measured(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What each block is, and the number of classes."""
    letters: dict[int, dict[int, str]] = {}
    names = {"conv2_kxk.conv.weight": "c", "self_attn.q.weight": "h", "self_attn.qkv.weight": "g"}
    for name in tensors:
        match = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", name)
        if match is not None and match[3] in names:
            letters.setdefault(int(match[1]), {})[int(match[2])] = names[match[3]]
    if not letters or sorted(letters) != list(range(len(letters))):
        return {}
    stages = tuple("".join(each for _, each in sorted(letters[s].items())) for s in sorted(letters))
    head = tensors.get("head.fc.weight")
    return {"stages": stages, **({} if head is None else {"classes": len(head)})}
