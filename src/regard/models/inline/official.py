"""The names of the authors' checkpoints, which hold the tensors under `model`.

Swin's also hold two things that its model computes from its sizes: which pairs of tokens have
which relative position, and the mask of shifted windows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.models.keys import Entry, Form, Keys, kept, renamed, within

STAGES = 8  # as many as any config may have
LEAVES = ("weight", "bias")


def _both(*names: str) -> tuple[Entry, ...]:
    return kept(*(f"{name}.{leaf}" for name in names for leaf in LEAVES))


def _moved(ours: str, theirs: str) -> tuple[Entry, ...]:
    return renamed(*((f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in LEAVES))


# Queries, keys and values of InLine blocks are one matrix of ours; PVT has two.
JOINED = Form(
    lambda parts, shape: torch.cat(list(parts)),
    lambda tensor: (tensor[: len(tensor) // 3], tensor[len(tensor) // 3 :]),
)
# Positions are a map of ours, a row of tokens of theirs.
ROW = Form(lambda parts, shape: parts[0].view(shape), lambda tensor: (tensor.flatten(1, 2),))

BLOCK = _both("norm1", "norm2", "mlp.fc1", "mlp.fc2")
RESIDUAL = ("residual.0", "residual.2")
INLINE = _both("attn.qkv", "attn.proj", *(f"attn.{name}" for name in RESIDUAL))

DEIT = Keys(
    (
        *within((*BLOCK, *INLINE), "blocks.{}.", "blocks.{}."),
        *renamed(("class_token", "cls_token"), ("position", "pos_embed")),
        *_moved("embed.proj", "patch_embed.proj"),
        *_both("norm", "head"),
    )
)

PVT_BLOCK = (
    *BLOCK,
    *(Entry(f"attn.qkv.{leaf}", (f"attn.q.{leaf}", f"attn.kv.{leaf}"), JOINED) for leaf in LEAVES),
    *_both("attn.q", "attn.kv", "attn.proj", "attn.sr", "attn.norm"),
    *_both(*(f"attn.{name}" for name in RESIDUAL)),
)


def _pvt(stage: int) -> tuple[Entry, ...]:
    ours, number = f"stages.{stage}.", stage + 1
    return (
        *within(PVT_BLOCK, f"{ours}blocks.{{}}.", f"block{number}.{{}}."),
        *within(_both("proj", "norm"), f"{ours}embed.", f"patch_embed{number}."),
        Entry(f"{ours}position", (f"pos_embed{number}",), ROW),
    )


PVT = Keys((*(entry for stage in range(STAGES) for entry in _pvt(stage)), *_both("head")))

SWIN_BLOCK = (*BLOCK, *INLINE, *kept("attn.relative_position_bias_table"))


def _swin(stage: int) -> tuple[Entry, ...]:
    ours = f"stages.{stage}."
    blocks = within(SWIN_BLOCK, f"{ours}blocks.{{}}.", f"layers.{stage}.blocks.{{}}.")
    if stage == 0:
        return *blocks, *within(_both("proj", "norm"), f"{ours}embed.", "patch_embed.")
    merging = (*_both("norm"), *kept("reduction.weight"))
    return *blocks, *within(merging, f"{ours}embed.", f"layers.{stage - 1}.downsample.")


SWIN = Keys(
    (*(entry for stage in range(STAGES) for entry in _swin(stage)), *_both("norm", "head")),
    derived=(
        "layers.{}.blocks.{}.attn.relative_position_index",
        "layers.{}.blocks.{}.attn_mask",
    ),
)

CSWIN_BLOCK = (
    *BLOCK,
    *_moved("attn.qkv", "qkv"),
    *_moved("attn.proj", "proj"),
    *within(_both("get_v", *RESIDUAL), "attn.attns.{}.", "attns.{}."),
)


def _cswin(stage: int) -> tuple[Entry, ...]:
    ours = f"stages.{stage}."
    blocks = within(CSWIN_BLOCK, f"{ours}blocks.{{}}.", f"stage{stage + 1}.{{}}.")
    embed = ("stage1_conv_embed.0", "stage1_conv_embed.2")
    if stage:
        embed = (f"merge{stage}.conv", f"merge{stage}.norm")
    proj, norm = embed
    return *blocks, *_moved(f"{ours}embed.proj", proj), *_moved(f"{ours}embed.norm", norm)


CSWIN = Keys(
    (*(entry for stage in range(STAGES) for entry in _cswin(stage)), *_both("norm", "head"))
)


# -- what the tensors tell of the sizes ------------------------------------------------------------


def measured_deit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Depth and classes."""
    found = _classes(tensors)
    blocks = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    return found | ({"depth": len(blocks)} if blocks else {})


def measured_pyramid(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Depths, which blocks are InLine's, and classes: published sizes and readme do not agree."""
    pattern = re.compile(r"(?:layers\.(\d+)\.blocks|block(\d+)|stage(\d+))\.(\d+)\.(.+)")
    inline: dict[int, dict[int, bool]] = {}
    for name in tensors:
        match = pattern.fullmatch(name)
        if match is not None:
            layer, block, stage, number, rest = match.groups()
            place = int(layer) if layer is not None else int(block or stage) - 1
            blocks = inline.setdefault(place, {})
            known = blocks.get(int(number), False)
            blocks[int(number)] = known or "residual." in rest
    found, letters, digits = _classes(tensors), "", ""
    if sorted(inline) != list(range(len(inline))):
        return found
    for _, blocks in sorted(inline.items()):
        kinds = [blocks[number] for number in sorted(blocks)]
        if len(set(kinds)) == 1:
            letters += "I" if kinds[0] else "S"
        else:
            letters, digits = letters + "M", digits + str(kinds.index(False))
    depths = tuple(len(inline[stage]) for stage in range(len(inline)))
    return found | ({"depths": depths, "attention": letters + digits} if depths else {})


def _classes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    head = tensors.get("head.weight")
    return {} if head is None else {"classes": len(head)}
