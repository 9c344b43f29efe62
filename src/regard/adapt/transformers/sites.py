"""The attention layers of a model of transformers, and what is known of them before they run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from regard.adapt.site import Site
from regard.core.checks import reject

CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
QUERY = ("q_proj", "query", "q", "c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "q_attn")
KEY = ("k_proj", "key", "k")


def sites(model: nn.Module) -> tuple[Site, ...]:
    """All attention layers that look their function up in the registry of transformers."""
    if not isinstance(model, nn.Module):
        raise reject("sites", "model", "a torch.nn.Module", model, kind=TypeError)
    found = [(n, m) for n, m in model.named_modules() if is_site(m)]
    return tuple(_site(number, name, module) for number, (name, module) in enumerate(found))


def is_site(module: nn.Module) -> bool:
    """Whether the module's forward calls a function of the registry."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = () if code is None else code.co_names
    return hasattr(module, "config") and "ALL_ATTENTION_FUNCTIONS" in names


def _site(number: int, name: str, module: Any) -> Site:
    config, forward = module.config, inspect.unwrap(type(module).forward)
    cross = CROSS.search(name) or CROSS.search(type(module).__name__)
    cross = bool(cross) or getattr(module, "is_cross_attention", False) is True
    query, key = (_first(module, names, nn.Module) for names in (QUERY, KEY))
    (dim, width), (memory_dim, kv_width) = _channels(query), _channels(key)
    head_dim = _first(module, HEAD_DIM, int)
    heads = _first(module, HEADS, int)
    if heads is None and head_dim and key is not None and width:
        heads = width // head_dim
    heads = heads or _first(config, HEADS, int)
    if head_dim is None and heads and width and key is not None:
        head_dim = width // heads
    kv_heads = _first(module, KEY_HEADS, int)
    if kv_heads is None and head_dim and kv_width:
        kv_heads = kv_width // head_dim
    if kv_heads is None and heads:
        kv_heads = heads // (_first(module, ("num_key_value_groups",), int) or 1)
    own_window = hasattr(module, "sliding_window") or hasattr(config, "layer_types")
    window = getattr(module if own_window else config, "sliding_window", None)
    uses_window = "sliding_window" in (forward.__code__.co_consts or ())
    uses_window = uses_window or any("sliding_window" in c for c in _names(forward.__code__))
    softcap = getattr(module, "attn_logit_softcapping", None)
    return Site(
        number, name, module, "cross" if cross else "self",
        bool(getattr(module, "is_causal", False)) and not cross,
        heads, kv_heads, head_dim, dim, memory_dim if key is not None else dim,
        window if isinstance(window, int) and uses_window else None,
        float(softcap) if isinstance(softcap, int | float) else None,
        getattr(module, "sinks", None) is not None,
        any("position_bias" in names for names in _names(forward.__code__)),
    )  # fmt: skip


def _names(code: Any) -> Iterable[Iterable[str]]:
    yield code.co_names
    yield code.co_varnames
    for constant in code.co_consts:  # keyword names of calls
        if isinstance(constant, tuple) and all(isinstance(x, str) for x in constant):
            yield constant


def _first(owner: Any, names: Iterable[str], kind: type) -> Any:
    found = (getattr(owner, name, None) for name in names)
    return next((x for x in found if isinstance(x, kind) and not isinstance(x, bool)), None)


def _channels(layer: Any) -> tuple[int | None, int | None]:
    """Inputs and outputs of a linear layer, also of GPT-2's, whose weight lies the other way."""
    if layer is None:
        return None, None
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if weight is not None and weight.dim() == 2 else (None, None)
