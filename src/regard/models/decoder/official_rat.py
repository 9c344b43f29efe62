"""How the authors of RAT lay out their four models.

Provenance: the `state_dict` of the language-modelling task of https://github.com/CLAIRE-Labo/RAT
(MIT): one matrix for all projections of a layer, embedding and head both there although tied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat

from regard.models.keys import Keys, Shapes, renamed, within

COMPILED = "_orig_mod."  # what torch.compile puts in front of names
EMBEDDING, HEAD = "embedding.wte.weight", "head.lm_head.weight"
IN_PROJ = "seq_layer.in_proj.weight"
LAYER_NUMBER = re.compile(r"backbone\.layers\.(\d+)\.")
PARTS = ("v", "q", "k")  # of an attention layer, in this order

LAYER = renamed(
    ("mixer_norm.weight", "seq_layer.input_norm.weight"),
    ("mixer.in_proj.weight", IN_PROJ),
    ("mixer.gate_bias", "seq_layer.gate_bias"),
    ("mixer.out_proj.weight", "seq_layer.out_proj.weight"),
    ("mixer.o_proj.weight", "seq_layer.out_proj.weight"),
    *((f"mixer.{part}_proj.weight", f"{IN_PROJ}[{part}]") for part in PARTS),
    ("mlp_norm.weight", "hidden_layer.ln.weight"),
    ("mlp.up_proj.weight", "hidden_layer.fc1.weight"),
    ("mlp.down_proj.weight", "hidden_layer.fc2.weight"),
)
MODEL = (
    *within(LAYER, "layers.{}.", "backbone.layers.{}."),
    *renamed(
        ("embed.weight", EMBEDDING), ("norm.weight", "backbone.ln.weight"), ("head.weight", HEAD)
    ),
)


@dataclass(frozen=True)
class RatKeys(Keys):
    """Keys of which one matrix of an attention layer is three of ours."""

    def to_ours(self, op: str, theirs: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Our tensors from theirs."""
        cut: dict[str, Tensor] = {}
        for name, tensor in theirs.items():
            name = name.replace(COMPILED, "")
            attends = name.endswith(IN_PROJ) and _ours_of(name) not in shapes
            pieces = tensor.chunk(len(PARTS)) if attends and tensor.dim() else ()
            if len(pieces) == len(PARTS):
                cut |= {f"{name}[{part}]": x for part, x in zip(PARTS, pieces, strict=True)}
            else:
                cut[name] = tensor
        return super().to_ours(op, cut, shapes)

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors from ours, the tied head among them."""
        made = super().to_theirs(ours)
        first, last = (f"[{PARTS[0]}]", f"[{PARTS[-1]}]")
        for name in [name.removesuffix(last) for name in made if name.endswith(last)]:
            if f"{name}{first}" in made:
                made[name] = cat([made.pop(f"{name}[{part}]") for part in PARTS])
        if EMBEDDING in made:
            made.setdefault(HEAD, made[EMBEDDING])
        return made


def _ours_of(name: str) -> str:
    return name.replace("backbone.", "").replace("seq_layer.", "mixer.")


def measured(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the configs that the shapes of a checkpoint tell: what all four have."""
    shapes = {name.replace(COMPILED, ""): tensor.shape for name, tensor in theirs.items()}
    numbers = [int(found[1]) for found in map(LAYER_NUMBER.match, shapes) if found]
    wide = shapes.get("backbone.layers.0.hidden_layer.fc1.weight")
    if len(shapes.get(EMBEDDING, ())) != 2 or wide is None or not numbers:
        return {}  # what is missing will be named
    vocabulary, dim = shapes[EMBEDDING]
    sizes = {"vocabulary": vocabulary, "dim": dim, "layers": max(numbers) + 1}
    return {**sizes, "mlp_dim": wide[0]}


def measured_rat(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The heads too, of which two groups have queries and keys, as published."""
    sizes = measured(theirs)
    names = {name.replace(COMPILED, ""): name for name in theirs}
    name = names.get(f"backbone.layers.0.{IN_PROJ}")
    shared = 0 if name is None or not sizes else theirs[name].shape[0] - 3 * sizes["dim"]
    return {**sizes, "heads": 4 * sizes["dim"] // shared} if shared > 0 else sizes


def measured_hybrid(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which layers are RAT, too."""
    sizes = measured_rat(theirs)
    gated = [name for name in theirs if name.endswith("seq_layer.gate_bias")]
    found = map(LAYER_NUMBER.match, (name.replace(COMPILED, "") for name in gated))
    later = [int(match[1]) for match in found if match and int(match[1])]
    return {**sizes, "step": min(later, default=sizes["layers"])} if sizes else sizes


KEYS = RatKeys(MODEL, {HEAD: EMBEDDING})
