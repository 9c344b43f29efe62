"""An attention layer of somebody's model, and how layers are named."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from regard.core.checks import describe, nearest, reject, words
from regard.core.patterns import Pattern

Layers = int | str | Iterable[int | str] | None


@dataclass(frozen=True)
class Site:
    """An attention layer of somebody's model.

    Fields:
        number: its place among the attention layers of the model, from 0.
        name: its path.
        module: the layer.
        kind: "self", or "cross": keys come from another sequence.
        causal: whether no output may depend on later tokens.
        heads, kv_heads, head_dim: sizes, None where the module does not tell.
        dim, memory_dim: channels of the tokens that queries, and keys, are made from.
        window: keys that a query sees, its own included, or None.
        softcap: the bound of the scores, or None.
        sinks: whether the layer has learned sinks. position_bias: whether it adds a bias to scores.
    """

    number: int
    name: str
    module: nn.Module
    kind: Literal["self", "cross"]
    causal: bool
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    dim: int | None
    memory_dim: int | None
    window: int | None
    softcap: float | None
    sinks: bool
    position_bias: bool

    @property
    def pattern(self) -> Pattern:
        """What an output of the layer may depend on."""
        if self.kind == "cross":
            return Pattern.CAUSAL_CROSS  # a decoder must not look at its later queries
        return Pattern.CAUSAL_SELF if self.causal else Pattern.NONCAUSAL_SELF


def choose(op: str, found: Collection[Site], layers: Layers) -> list[Site]:
    """Those that `layers` names: numbers, paths, or patterns of paths as `"*.encoder_attn"`."""
    if layers is None:
        return list(found)
    wanted: Iterable[Any] = layers if isinstance(layers, Iterable) else [layers]
    wanted = [layers] if isinstance(layers, str) else wanted
    chosen: dict[int, Site] = {}
    paths = [site.name for site in found]
    for item in wanted:
        if isinstance(item, bool) or not isinstance(item, int | str):
            accepted = "numbers or paths of attention layers"
            raise reject(op, "layers", accepted, item, kind=TypeError)
        if isinstance(item, int):
            hits = [site for site in found if site.number == item]
            accepted = f"below {len(found)}, the number of attention layers, and at least 0"
            got: Any = item
        else:
            hits = [s for s in found if s.name == item or fnmatch.fnmatchcase(s.name, item)]
            accepted = "paths of attention layers, or patterns that match some"
            got = words(describe(item) + nearest(item, paths))
        if not hits:
            raise reject(op, "layers", accepted, got)
        chosen |= {site.number: site for site in hits}
    if not chosen:
        raise reject(op, "layers", "None or at least one layer", words("none"))
    return [chosen[number] for number in sorted(chosen)]
