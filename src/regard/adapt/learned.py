"""What a mechanism learns in a layer: operands, feature maps, and a ridge or a bandwidth per head.

operands          a linear map of the token or a parameter, as `regard.mixers.Attention` makes
feature maps      as `regard.mixers.Hedgehog` has them, identity at the start
log_ridge [H]     ridge_h = exp(log_ridge_h), from the ridge that was given
log_scale [H]     scale_h = exp(log_scale_h) times the layer's own scale, 0 at the start; the
                  scale is the inverse of a squared bandwidth, or of a temperature
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.adapt.site import Site
from regard.core.card import Card
from regard.core.checks import check_number, reject, words
from regard.mixers import hedgehog
from regard.mixers.arguments import taken
from regard.mixers.operands import Operands, TokenOperand, check_operand

LEARNABLE = ("ridge", "bandwidth", "temperature")
MAPPED = ("hedgehog", "hedgehog_window")  # mechanisms that are nothing without feature maps
MAP_OPTIONS = ("features", "feature_dim", "feature_options", "share_key_maps")
# Their `scale` multiplies features, not scores: 1 unless asked for, whatever the layer has.
UNSCALED = ("linear", "lightning")


def scales_scores(card: Card) -> bool:
    """Whether the layer's own scale is that of the op."""
    return "scale" in taken(card) and card.name not in UNSCALED


def lacks(card: Card, site: Site) -> str | None:
    """Why the operands of a mechanism cannot be made in this layer, or None."""
    for operand in card.operands:
        try:
            check_operand("swap", operand)
        except ValueError:
            return f"its operand {operand.name!r} is a plan, which no layer of a model makes"
    needed = {"heads": site.heads, "kv_heads": site.kv_heads, "head_dim": site.head_dim}
    if card.operands:
        needed |= {"dim": site.dim, "memory_dim": site.memory_dim}
    if card.operands or card.name in MAPPED:
        missing = [name for name, size in needed.items() if size is None]
        if missing:
            return f"the layer does not tell its {', '.join(missing)}, which learned parts need"
        if site.dim != site.memory_dim and any(o.source == "key" for o in card.operands):
            return f"queries have {site.dim} channels and keys {site.memory_dim}"
    return None


class Learned(nn.Module):
    """The parameters of one mechanism in one layer; `arguments` are those of its op.

    Args:
        learn: which of "ridge", "bandwidth" and "temperature" (the same number, named for local
            linear and for softmax attention) become parameters; None: none of them.
        options: those of `swap`; what belongs to the parts is taken out.
    """

    def __init__(
        self, op: str, card: Card, site: Site, options: dict[str, Any], learn: tuple[str, ...]
    ) -> None:
        super().__init__()
        sizes = {"h": site.heads, "hk": site.kv_heads, "d": site.head_dim, "dv": site.head_dim}
        known = {axis: size for axis, size in sizes.items() if size is not None}
        self.operands = Operands(op, tuple(card.operands), site.dim or 0, known)
        for name in self.operands.probes:  # Parallax without a probe is softmax attention
            probe = self.operands[name]
            assert isinstance(probe, TokenOperand)
            nn.init.zeros_(probe.weight)
        self.feature_map_q = self.feature_map_k = self.window_factors = None
        self.log_ridge = self.log_scale = None
        self.scale: float | None = None  # the layer's own, of the last call
        if card.name in MAPPED:
            self._map(card, site, options)
        self._free(op, card, site, options, learn)

    def _map(self, card: Card, site: Site, options: dict[str, Any]) -> None:
        assert site.heads is not None
        assert site.kv_heads is not None
        assert site.head_dim is not None
        given = {name: options.pop(name) for name in MAP_OPTIONS if name in options}
        shared = given.pop("share_key_maps", False)
        windowed = card.name == "hedgehog_window"
        if windowed and "gamma" in options:
            given["gamma"] = options.pop("gamma")
        own = hedgehog.attach(
            self, site.heads, site.head_dim, key_maps=site.kv_heads if shared else site.heads,
            windowed=windowed, **given,
        )  # fmt: skip
        for name in own:
            if name in options:
                accepted = f"without {name!r}, which follows from features"
                raise reject("swap", "options", accepted, options)
        options |= own

    def _free(
        self, op: str, card: Card, site: Site, options: dict[str, Any], learn: tuple[str, ...]
    ) -> None:
        accepted = takes_parts(card)
        for name in learn:
            if name not in accepted:
                offered = ", ".join(accepted) or "nothing"
                raise reject(op, "learn", f"of {offered} for mechanism {card.name!r}", name)
            if site.heads is None:
                raise reject(op, "learn", f"() for {site.name}, whose heads are unknown", name)
        if "ridge" in learn:
            ridge = options.pop("ridge", 1.0)
            check_number(op, "ridge", ridge, above=0.0)
            self.log_ridge = nn.Parameter(torch.full((site.heads or 0,), math.log(ridge)))
        if {"bandwidth", "temperature"} & set(learn):
            if "scale" in options:
                raise reject(op, "scale", "left out where it is learned", options["scale"])
            self.log_scale = nn.Parameter(torch.zeros(site.heads or 0))

    def names(self) -> tuple[str, ...]:
        """Arguments of the op that come from here, beside the operands of its card."""
        maps = () if self.feature_map_q is None else tuple(hedgehog.operands(self))
        free = {"ridge": self.log_ridge, "scale": self.log_scale}
        return (*maps, *(name for name, parameter in free.items() if parameter is not None))

    def arguments(self, scale: float | None, tokens: Tensor | None, memory: Tensor | None) -> Any:
        """Arguments of the op beside q, k, v and masks."""
        given: dict[str, Any] = {}
        self.scale = scale
        if len(self.operands):
            if tokens is None:
                raise RuntimeError(
                    "swap: the layer was called past its forward, so that nobody saw the tokens "
                    f"that {', '.join(self.operands)} are made from"
                )
            given |= self.operands(tokens, tokens if memory is None else memory)
        if self.feature_map_q is not None:
            given |= hedgehog.operands(self)
        if self.log_ridge is not None:
            given["ridge"] = _wide(self.log_ridge).exp()
        if self.log_scale is not None:
            given["scale"] = _wide(self.log_scale).exp() * (1.0 if scale is None else scale)
        return given

    @torch.no_grad()
    def chosen(self) -> dict[str, list[float]]:
        """What every head has come to: "ridge", and "scale" in multiples of the layer's own."""
        found: Mapping[str, Tensor | None] = {"ridge": self.log_ridge, "scale": self.log_scale}
        return {name: _wide(x).exp().tolist() for name, x in found.items() if x is not None}


def takes_parts(card: Card) -> tuple[str, ...]:
    """What of `LEARNABLE` a mechanism has."""
    takes = taken(card)
    names = ("ridge",) if "ridge" in takes and card.name in ("local_linear", "mesa") else ()
    return (*names, "bandwidth", "temperature") if scales_scores(card) else names


def pieces(learn: Any) -> tuple[str, ...]:
    """`learn` as names."""
    names = (learn,) if isinstance(learn, str) else learn
    if not isinstance(names, tuple | list | set | frozenset):
        raise reject("swap", "learn", "a name or several", learn, kind=TypeError)
    for name in names:
        if name not in LEARNABLE:
            listed = ", ".join(map(repr, LEARNABLE))
            raise reject("swap", "learn", f"of {listed}", words(repr(name)))
    return tuple(names)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
