"""Taps on this library's own layers: the op in their card is called through the tap."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn

from regard.core.card import Card
from regard.lens.taps.call import Attention
from regard.lens.taps.station import OUTSIDE_GRAPHS, Point, Station
from regard.lens.taps.transformers import point_by_path

SCORES = {"scale", "key_mask", "bias", "softcap", "sinks", "window", "state", "return_state"}
SCORES |= {"impl", "block_size"}  # these change no number of the scores


def is_tappable(module: nn.Module) -> bool:
    """Whether the module is `mixers.Attention`, or one made from it."""
    # Where no layer was ever made, its file need not be imported.
    layers = sys.modules.get("regard.mixers.attention")
    return layers is not None and isinstance(module, layers.Attention)


def point_of(name: str, module: nn.Module, order: int) -> Point:
    """What is known of a layer before it runs; whether it is cross-attention shows then."""
    heads: Any = module.heads
    return point_by_path(name, order, "self", heads)


class MixerStation(Station):
    """A station on a layer of ours."""

    card: Card | None = None

    def install(self) -> None:
        layer: Any = self.module
        self.card = layer.card
        layer.card = dataclasses.replace(layer.card, op=self._call)

    def remove(self) -> None:
        layer: Any = self.module
        if self.card is not None:
            layer.card, self.card = self.card, None

    @torch.compiler.disable(reason=OUTSIDE_GRAPHS)
    def _call(self, *, q: Tensor, k: Tensor, v: Tensor, causal: bool, **given: Any) -> Any:
        card: Any = self.card
        result = card.op(q=q, k=k, v=v, causal=causal, **given)
        layer = self.layer_now()
        listeners = self.listening(layer)
        if not listeners:
            return result
        output, after = result if given.get("return_state") else (result, None)
        past, offset = given.get("state"), 0
        why = None if card.name == "softmax" else f"the layer's mechanism is {card.name!r}"
        if why is None and (unknown := sorted(given.keys() - SCORES)):
            why = f"taps do not know the scores with {', '.join(unknown)}"
        key_mask = given.get("key_mask")
        if past is not None:
            offset = past.length
            if why is None:
                key_mask = _joined(past.key_mask, key_mask, past.k, k)
                k, v = torch.cat([past.k, k], 2), torch.cat([past.v, v], 2)
        layer_causal: Any = self.module.causal
        attention = Attention(
            layer=layer,
            name=self.point.name,
            kind="cross" if layer_causal and not causal else "self",
            module=self.module,
            q=q,
            k=k,
            v=v,
            scale=given["scale"] if given.get("scale") is not None else q.shape[-1] ** -0.5,
            output=output,
            mask=None if why else _mask(q, k, given.get("window"), key_mask),
            diagonal=k.shape[2] - q.shape[2] if causal and not why else None,
            bias=given.get("bias"),
            softcap=given.get("softcap"),
            sinks=given.get("sinks"),
            offset=offset,
            softmax=why,
        )
        self.hand_over(attention, listeners)
        return (attention.output, after) if given.get("return_state") else attention.output


def _joined(old: Tensor | None, new: Tensor | None, past: Tensor, k: Tensor) -> Tensor | None:
    if old is None and new is None:
        return None
    parts = ((old, past), (new, k))
    masks = [
        keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool) if mask is None else mask
        for mask, keys in parts
    ]
    return torch.cat(masks, 1)


def _mask(
    q: Tensor, k: Tensor, window: tuple[int, int] | None, key_mask: Tensor | None
) -> Tensor | None:
    T, S = q.shape[2], k.shape[2]
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if window is not None and tuple(window) != (-1, -1):
        left, right = window
        apart = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
        near = (apart <= (left if left >= 0 else S)) & (-apart <= (right if right >= 0 else S))
        mask = near[None, None] if mask is None else mask & near
    return mask
