"""What an attention layer accepts: its sizes, its mechanism and options, and what a call brings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regard.core import checks
from regard.core.cache import KVCache
from regard.core.card import Card
from regard.core.checks import Sizes, describe, nearest, reject, words
from regard.core.group import StateGroup
from regard.core.packed import check_packed
from regard.core.patterns import Pattern
from regard.core.registry import Mechanisms
from regard.core.state import FixedState

if TYPE_CHECKING:
    from regard.mixers.attention import Attention

ROPE_BASE = 10000.0
KINDS = {False: "self_attention", True: "cross_attention"}  # names of a state
CARDS = Mechanisms("regard.ops")
# Arguments of an op that the layer itself gives.
OWN = (
    "q", "k", "v", "causal", "key_mask", "cu_seqlens", "cu_seqlens_k",
    "state", "return_state", "return_aux",
)  # fmt: skip


def check_sizes(op: str, dim: Any, heads: Any, kv_heads: Any, head_dim: Any) -> None:
    """Whole numbers that divide each other where they must."""
    for name, size in (("dim", dim), ("heads", heads)):
        checks.check_integer(op, name, size)
    for name, size in (("kv_heads", kv_heads), ("head_dim", head_dim)):
        if size is not None:
            checks.check_integer(op, name, size)
    if kv_heads is not None and heads % kv_heads:
        raise reject(op, "heads", f"a multiple of kv_heads, {kv_heads}", heads)
    if head_dim is None and dim % heads:
        accepted = f"a multiple of heads, {heads}, where head_dim is not given"
        raise reject(op, "dim", accepted, dim)


def rope_base(op: str, rope: Any, head_dim: int) -> float | None:
    """The base of the rotary angles, or None without positions."""
    if rope is False:
        return None
    base = ROPE_BASE if rope is True else rope
    checks.check_number(op, "rope", base, above=1)
    if head_dim % 2:
        raise reject(op, "rope", f"False where head_dim is odd, here {head_dim}", rope)
    return float(base)


def check_dropout(op: str, dropout: Any) -> float:
    """A probability below 1."""
    checks.check_number(op, "dropout", dropout, least=0)
    if dropout >= 1:
        raise reject(op, "dropout", "a probability below 1", dropout)
    return float(dropout)


def find_card(op: str, mechanism: Any, causal: bool) -> Card:
    """The card that was named or given, if it serves a pattern of this causality at all."""
    if not isinstance(mechanism, str | Card):
        accepted = "the name of a mechanism or a Card"
        raise reject(op, "mechanism", accepted, mechanism, kind=TypeError)
    card = mechanism if isinstance(mechanism, Card) else CARDS[mechanism]
    if not any(pattern.online == causal for pattern in card.patterns):
        raise reject(op, "causal", f"{not causal} with mechanism {card.name!r}", causal)
    return card


def taken(card: Card) -> frozenset[str]:
    """The names of the op's arguments."""
    return frozenset(inspect.signature(card.op).parameters)


def check_options(op: str, options: Any, card: Card, learned: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of the card's op that nobody else gives."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise reject(op, "options", "a mapping of the op's arguments", options, kind=TypeError)
    own = {*OWN, *learned, *(operand.name for operand in card.operands)}
    free = taken(card) - own
    for name, value in options.items():
        if name in own:
            raise reject(op, "options", f"without {name!r}, which the layer gives", options)
        if name not in free:
            accepted = f"arguments of {card.op.__name__} ({', '.join(sorted(free))})"
            raise reject(op, "options", accepted, words(describe(name) + nearest(name, free)))
        if isinstance(value, Tensor):
            accepted = "plain values, as a tensor would not follow the module to a device"
            raise reject(op, "options", accepted, words(f"{name}={describe(value)}"))
    return dict(options)


def check_call(layer: Attention, x: Any, memory: Any, state: Any) -> bool:
    """Whether it is cross-attention; tokens and state must fit the layer and its mechanism."""
    op = type(layer).__name__
    checks.check_state(op, state, StateGroup)
    cross = memory is not None or (state is not None and state.name == KINDS[True])
    for name, tokens in (("x", x), ("memory", memory)):
        if name == "memory" and memory is None:
            continue
        if not isinstance(tokens, Tensor):
            raise reject(op, name, "a torch.Tensor", tokens, kind=TypeError)
        if tokens.dim() != 3 or tokens.shape[2] != layer.dim:
            raise reject(op, name, f"of shape [batch, length, {layer.dim}]", tokens)
        if tokens.shape[0] != x.shape[0] or tokens.device != x.device:
            accepted = f"of x's batch size {x.shape[0]} on {x.device}"
            raise reject(op, name, accepted, tokens)
    if state is not None:
        _check_state(layer, x, state, cross)
    for pattern in Pattern:
        wanted = pattern.cross == cross and pattern.online == layer.causal
        if wanted and pattern not in layer.card.patterns:
            served = ", ".join(item.value for item in layer.card.patterns)
            accepted = f"{'None' if cross else 'given'} with causal={layer.causal} and mechanism "
            accepted += f"{layer.card.name!r}, which serves {served}"
            raise reject(op, "memory", accepted, memory)
    if cross and layer.rope_base is not None:
        raise reject(op, "memory", "None with rope, which counts within one sequence", memory)
    if cross and layer.short_conv is not None:
        raise reject(op, "memory", "None with short_conv, which runs along one sequence", memory)
    return cross


def _check_state(layer: Attention, x: Tensor, state: StateGroup, cross: bool) -> None:
    op = type(layer).__name__
    if "attention" not in state.parts or state.name != KINDS[cross]:
        raise reject(op, "state", f"one of {KINDS[cross]}", words(f"one of {state.name}"))
    counted = layer.rope_base is not None and not isinstance(state["attention"], KVCache)
    held = {"short_conv": layer.short_conv is not None, "real_tokens": counted}
    for name, wanted in held.items():
        if (name in state.parts) != wanted:
            accepted = f"one {'with' if wanted else 'without'} {name}, as this layer's"
            raise reject(op, "state", accepted, words(f"one of {', '.join(state.parts)}"))
    for part in state.parts.values():
        tensors = part.tensors.values() if isinstance(part, FixedState) else ()
        tensors = (part.k,) if isinstance(part, KVCache) else tensors
        rows = [len(tensor) for tensor in tensors if len(tensor) != len(x)]
        if rows:
            raise reject(op, "state", f"of x's batch size {len(x)}", words(f"one of {rows[0]}"))


def check_inputs(
    layer: Attention,
    x: Tensor,
    source: Tensor,
    inputs: Mapping[str, Any],
    state: StateGroup | None,
    return_state: Any,
) -> None:
    """Masks and offsets that fit the tokens, and that the mechanism's op can use."""
    op = type(layer).__name__
    checks.check_flag(op, "return_state", return_state)
    given = {**inputs, "state": state, "return_state": return_state or None}
    for name, value in given.items():
        if value is not None and name not in layer.takes:
            accepted = f"left out with mechanism {layer.card.name!r}, whose op has no {name}"
            raise reject(op, name, accepted, value)
    if inputs["cu_seqlens_k"] is not None and source is x:
        raise reject(op, "cu_seqlens_k", "None without memory", inputs["cu_seqlens_k"])
    B, T, D = *x.shape[:2], layer.head_dim
    sizes = Sizes(B, layer.heads, layer.kv_heads, T, source.shape[1], D, D)
    checks.check_key_mask(op, inputs["key_mask"], sizes, x)
    check_packed(op, inputs["cu_seqlens"], inputs["cu_seqlens_k"], sizes, state)
