"""Taps on models of transformers (4.56 and later) whose attention goes through its registry.

Their attention modules look their function up by the name in `self.config`. A station gives the
module a copy of its config with a private name, under which a function is registered that runs
what the true name means and hands the call over. The model's own config and therefore its masks,
caches and choice of kernel stay as they are: that is why reading changes no bit, under "eager"
and "sdpa" alike. (A private name on the model's config would lose its masks.)
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.lens.layers import heads_of
from regard.lens.taps.call import Attention, Kind
from regard.lens.taps.station import OUTSIDE_GRAPHS, STATIONS, Point, Station

NAME = "regard_tap"
NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
SOFTMAX = ("eager", "sdpa", "regard:softmax")
CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)


def is_tappable(module: nn.Module) -> bool:
    """Whether the module looks its attention function up in the registry of transformers."""
    if "transformers" not in sys.modules or not hasattr(module, "config"):
        return False
    code = getattr(_forward(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def point_of(name: str, module: nn.Module, order: int) -> Point:
    """What is known of an attention module before it runs."""
    config: Any = module.config
    kind: Kind = "cross" if CROSS.search(name) or CROSS.search(type(module).__name__) else "self"
    point = point_by_path(name, order, kind, heads_of(module))
    if groups := getattr(config, "num_hidden_groups", None):  # ALBERT: layers share modules
        repeats = config.num_hidden_layers // groups
        found = re.search(r"layer_groups\.(\d+)", name)
        layer = int(found.group(1)) * repeats if found else 0
        point = replace(point, layer=layer, repeats=repeats)
    return point


def point_by_path(name: str, order: int, kind: Kind, heads: int | None) -> Point:
    """A point whose layer is the last number in the path, or else its place among its like."""
    number = stack_number(name)
    if number is None:
        return Point(name, "", order, kind, heads)
    return Point(name, name[: number.start()], int(number.group(1)), kind, heads)


def stack_number(name: str) -> re.Match[str] | None:
    """The number in a path that counts the layers of a stack: the last one.

    But not that of T5's blocks, each of which keeps its parts in a list: `block.3.layer.0`.
    """
    numbers = [*NUMBER.finditer(name)]
    if len(numbers) > 1 and re.search(r"\bblock\.\d+\.layer$", name[: numbers[-1].start()]):
        return numbers[-2]
    return numbers[-1] if numbers else None


class TransformersStation(Station):
    """A station on an attention module of transformers."""

    config: Any = None

    def install(self) -> None:
        _register()
        config: Any = self.module.config
        implementation = config._attn_implementation or "eager"
        if "flash" in implementation or implementation.startswith(("flex", "paged")):
            raise ValueError(
                f"tap: {self.point.name} uses {implementation!r}, which is not open to taps; "
                "call model.set_attn_implementation('sdpa') or 'eager' first"
            )
        self.config = config
        # A shallow copy, changed past the setter, which would reach into shared sub-configs.
        private = copy.copy(config)
        private.__dict__["_attn_implementation_internal"] = NAME
        hook = self.module.register_forward_pre_hook(self._see_call, with_kwargs=True)
        self._handles.append(hook)
        self.module.config = private

    def remove(self) -> None:
        if self.config is not None:
            self.module.config, self.config = self.config, None

    def _see_call(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = next((kwargs[key] for key in CACHES if kwargs.get(key) is not None), None)
        self.here.offset = _length(cache, getattr(self.module, "layer_idx", None))

    def call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model's own function, hand the call over, give back what it became."""
        name = self.config._attn_implementation or "eager"
        own = _function(self.module, name)
        output, weights = own(self.module, query, key, value, mask, **options)
        layer = self.layer_now()
        listeners = self.listening(layer)
        if not listeners:
            return output, weights
        kind = self.point.kind
        offset = getattr(self.here, "offset", 0) if kind == "self" else 0
        dropout = float(options.get("dropout") or 0.0) if self.module.training else 0.0
        attention = Attention(
            layer=layer,
            name=self.point.name,
            kind=kind,
            module=self.module,
            q=query,
            k=key,
            v=value,
            scale=_or(options.get("scaling"), query.shape[-1] ** -0.5),
            output=output.transpose(1, 2),
            mask=_checked(mask, self.module),
            diagonal=0 if _implies_causal(self.module, name, query, mask, options) else None,
            bias=options.get("position_bias"),
            softcap=options.get("softcap"),
            sinks=_or(options.get("s_aux"), getattr(self.module, "sinks", None)),
            dropout=dropout,
            offset=offset,
            softmax=None if name in SOFTMAX else f"the model's attention is {name!r}",
            given=weights if isinstance(weights, Tensor) and not dropout else None,
        )
        before = attention.output
        self.hand_over(attention, listeners)
        if attention.changed is not None and isinstance(weights, Tensor):
            weights = attention.weights
        if attention.output is not before:
            output = attention.output.transpose(1, 2).contiguous()
        return output, weights


CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value


def _length(cache: Any, layer: int | None) -> int:
    """Tokens that the cache holds for a layer before this call."""
    if cache is None:
        return 0
    cache = getattr(cache, "self_attention_cache", cache)
    if not hasattr(cache, "get_seq_length"):
        return 0
    return int(cache.get_seq_length(layer or 0))


def _checked(mask: Any, module: nn.Module) -> Tensor | None:
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim != 4:
        raise ValueError(
            f"tap: {type(module).__name__} got a mask of shape {list(mask.shape)}; taps know "
            "masks [B, 1 or H, T, S]"
        )
    return mask


def _implies_causal(module: nn.Module, name: str, query: Tensor, mask: Any, options: dict) -> bool:
    """Whether the function masks later keys although it was given no mask, as sdpa does."""
    if isinstance(mask, Tensor) or name == "eager" or query.shape[2] == 1:
        return False
    return bool(_or(options.get("is_causal"), getattr(module, "is_causal", True)))


def _forward(module: nn.Module) -> Callable[..., Any]:
    return inspect.unwrap(type(module).forward)


def _function(module: nn.Module, name: str) -> Callable[..., Any]:
    """What a name of an attention implementation means for a module."""
    forward: Any = _forward(module)
    known = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    if name in known:
        return known[name]
    if name != "eager":
        raise ValueError(f"tap: no attention function is registered as {name!r}")
    for candidate in forward.__code__.co_names:
        if "eager" in candidate and callable(forward.__globals__.get(candidate)):
            return forward.__globals__[candidate]
    raise ValueError(f"tap: {type(module).__name__} has no eager attention that is known here")


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _tapped)


@torch.compiler.disable(reason=OUTSIDE_GRAPHS)
def _tapped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    station = STATIONS.get(module)
    if not isinstance(station, TransformersStation):
        raise RuntimeError(f"tap: {type(module).__name__} was copied while a tap was open on it")
    return station.call(query, key, value, attention_mask, options)
