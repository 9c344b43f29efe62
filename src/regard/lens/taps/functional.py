"""Taps on modules as timm has them: a fused projection `qkv`, attention in plain torch, `proj`.

While such a module runs, its calls of `scaled_dot_product_attention` are handed over; where it
forms weights itself, its softmax and the products on either side of it are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from regard.lens.fused import Answering, FusedCall
from regard.lens.layers import heads_of
from regard.lens.taps.call import Attention
from regard.lens.taps.station import OUTSIDE_GRAPHS, Point, Station
from regard.lens.taps.transformers import point_by_path

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


def is_tappable(module: nn.Module) -> bool:
    """Whether the module has the projections `qkv` and `proj` of timm's attention."""
    children = dict(module.named_children())
    return "qkv" in children and "proj" in children and not hasattr(module, "config")


def point_of(name: str, module: nn.Module, order: int) -> Point:
    """What is known of a module before it runs."""
    return point_by_path(name, order, "self", heads_of(module))


class FunctionalStation(Station):
    """A station on a module whose attention is plain torch."""

    before: Any = None  # a `forward` that somebody else had put on the module itself

    def install(self) -> None:
        self.before = self.module.__dict__.get("forward")
        own = self.module.forward

        @torch.compiler.disable(reason=OUTSIDE_GRAPHS)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Watch(self):
                return own(*args, **kwargs)

        self.module.forward = forward

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)
        if self.before is not None:
            self.module.forward, self.before = self.before, None

    def hand(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, **given: Any) -> Tensor:
        """Hand one call over; what the module goes on with."""
        layer = self.layer_now()
        listeners = self.listening(layer)
        if not listeners:
            return output
        attention = Attention(
            layer=layer,
            name=self.point.name,
            kind="self",
            module=self.module,
            q=q,
            k=k,
            v=v,
            output=output,
            **given,
        )
        self.hand_over(attention, listeners)
        return attention.output


class _Watch(Answering):
    """Follows one run of a module: product, softmax, product; or the fused function."""

    def __init__(self, station: FunctionalStation) -> None:
        super().__init__()
        self.station = station
        self.product: tuple[Tensor, Tensor] | None = None
        self.scores: Tensor | None = None
        self.weights: Tensor | None = None

    def other(
        self, function: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]
    ) -> Any:
        result = function(*args, **named)
        if function in SOFTMAXES and isinstance(result, Tensor) and result.ndim == 4:
            if self.product is not None:
                self.scores, self.weights = args[0], result
        elif function in PRODUCTS and isinstance(result, Tensor) and result.ndim == 4:
            return self._product(result, args[0], args[1])
        return result

    def _product(self, result: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if self.weights is None or self.scores is None or self.product is None:
            self.product = (left, right)
            return result
        q, k_transposed = self.product
        given = {"formed": self.scores, "given": self.weights, "scale": 1.0}
        self.product = self.scores = self.weights = None
        return self.station.hand(q, k_transposed.transpose(-2, -1), right, result, **given)

    def fused(self, call: FusedCall) -> Tensor:
        mask = call.attn_mask
        if mask is not None and mask.ndim < 4:
            mask = mask[(None,) * (4 - mask.ndim)]
        return self.station.hand(
            call.query,
            call.key,
            call.value,
            call.run(),
            mask=mask,
            diagonal=0 if call.is_causal else None,  # torch aligns it at the start
            scale=call.query.shape[-1] ** -0.5 if call.scale is None else call.scale,
            dropout=call.dropout_p,
        )
