"""`scaled_dot_product_attention` with torch's signature and any mechanism behind it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from regard.core.card import Card
from regard.core.checks import FLOATS, check_flag, check_number, nearest, reject, words
from regard.core.registry import Mechanisms

OP = "scaled_dot_product_attention"
CARDS = Mechanisms("regard.ops")
# Arguments of an op that torch's signature says in its own way, or that return more than torch.
OWN = {
    "q": "query", "k": "key", "v": "value", "causal": "is_causal", "scale": "scale",
    "bias": "attn_mask", "key_bias": "attn_mask", "key_mask": "attn_mask",
    "cu_seqlens": "the op itself", "cu_seqlens_k": "the op itself", "state": "the op itself",
    "return_state": "the op itself", "return_aux": "the op itself",
}  # fmt: skip


def scaled_dot_product_attention(
    query: Float[Tensor, "... h t d"],
    key: Float[Tensor, "... hk s d"],
    value: Float[Tensor, "... hk s dv"],
    attn_mask: Bool[Tensor, "*mask"] | Float[Tensor, "*mask"] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mechanism: str | Card = "softmax",
    **options: Any,
) -> Float[Tensor, "... h t dv"]:
    """torch's function of this name, with any mechanism in the place of softmax attention.

        out = op(query, key, value)     op: that of `regard.mechanisms[mechanism]`

    A call that works with `torch.nn.functional.scaled_dot_product_attention` gives the same
    result with the default mechanism, or is refused by name:

    - `dropout_p` above 0 is refused, as most mechanisms have no weights to drop; drop elements
      of the output instead.
    - As torch documents, `attn_mask` and `is_causal` exclude each other.
    - A query that sees no key gives 0.

    Args:
        query: [..., H, T, D], of two dimensions at least.
        key, value: [..., Hk, S, D] and [..., Hk, S, Dv]. Leading dimensions broadcast.
        attn_mask: broadcast to [..., H, T, S]; bool (True = seen) or added to the scores. A
            mechanism that has no `bias` needs it to be the same for all queries (of size 1 along
            T): it is its `key_bias`, or its `key_mask` if bool and the same for all heads.
        is_causal: query i sees keys j <= i, aligned at the *start* when T != S, as in torch.
            (Ops of regard align at the end, for decoding.)
        scale: None for the mechanism's default, which is D ** -0.5 for softmax attention.
        enable_gqa: allows H to be a multiple of Hk.
        mechanism: the name of a card, or a card.
        options: arguments of the card's op, such as `ridge=0.1`; a tensor among them, in the
            shape that the op says, needs inputs of four dimensions, and T = S if `is_causal`.

    Precision: that of the op: sums of bfloat16 and float16 in float32.
    Cost: that of the op. A float mask, and a bool one that differs between queries, goes
        through softmax attention's own blocks, not through torch's fused kernel.
    Raises: TypeError, ValueError naming the argument.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> out = scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(out, wanted, atol=1e-6)
    True
    >>> scaled_dot_product_attention(q, k, v, mechanism="local_linear", ridge=0.1).shape
    torch.Size([1, 2, 5, 8])
    """
    card = mechanism if isinstance(mechanism, Card) else CARDS[mechanism]
    check_flag(OP, "is_causal", is_causal)
    check_flag(OP, "enable_gqa", enable_gqa)
    check_number(OP, "dropout_p", dropout_p, least=0)
    if dropout_p > 0:
        accepted = "0.0 (there may be no weights to drop: apply dropout to the output instead)"
        raise reject(OP, "dropout_p", accepted, dropout_p)
    if is_causal and attn_mask is not None:
        raise reject(OP, "attn_mask", "None with is_causal", attn_mask)
    if not any(pattern.causal == is_causal for pattern in card.patterns):
        accepted = f"{not is_causal} with mechanism {card.name!r}"
        raise reject(OP, "is_causal", accepted, is_causal)
    q, k, v, lead = _four(query, key, value, enable_gqa)
    T, S = q.shape[2], k.shape[2]
    _check_options(card, options, query.dim() == 4 and not (is_causal and T != S))
    given = dict(options)
    if scale is not None:
        if not card.accepts("scale"):
            raise reject(OP, "scale", f"None with mechanism {card.name!r}", scale)
        given["scale"] = scale
    if attn_mask is not None:
        given |= _translate(card, attn_mask, q, k, lead)
    if is_causal and T < S:  # queries stand at the first keys: later ones are seen by none
        k, v = k[:, :, :T], v[:, :, :T]
    elif is_causal and T > S:  # ... and the last queries see all keys
        if not card.accepts("key_mask"):
            accepted = f"at most as long as key with mechanism {card.name!r} and is_causal"
            raise reject(OP, "query", accepted, query)
        given["key_mask"] = (torch.arange(T, device=q.device) < S).expand(q.shape[0], T)
        k, v = (pad(t, (0, 0, 0, T - S)) for t in (k, v))
    out = card.op(q=q, k=k, v=v, causal=is_causal, **given)
    return out.reshape(*lead, T, v.shape[3])


def _four(
    query: Any, key: Any, value: Any, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """q, k, v in four dimensions, and the leading dimensions of the output.

    Three dimensions are [batch, length, channels], but heads where heads may differ.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise reject(OP, name, "a torch.Tensor", tensor, kind=TypeError)
        if tensor.dim() < (3 if enable_gqa else 2):
            raise reject(OP, name, "[..., heads, length, channels]", tensor)
    tensors = (query, key, value)
    fixed = 3 if enable_gqa else 2  # trailing dimensions that are not broadcast
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-fixed] for t in tensors))
    except RuntimeError:
        hint = "" if enable_gqa else "; enable_gqa=True allows fewer heads of key and value"
        got = ", ".join(str(list(t.shape)) for t in tensors)
        accepted = f"of leading dimensions that broadcast{hint}"
        raise reject(OP, "query, key, value", accepted, words(got)) from None
    q, k, v = (t.expand(*lead, *t.shape[-fixed:]) for t in tensors)
    full = tuple(q.shape[:-2])
    batch = math.prod(full[:1] if q.dim() == 3 and not enable_gqa else full[:-1])
    q, k, v = (_view(t, batch, full, enable_gqa) for t in (q, k, v))
    return q, k, v, full


def _view(t: Tensor, batch: int, full: tuple[int, ...], enable_gqa: bool) -> Tensor:
    heads = t.shape[-3] if len(full) > 1 or enable_gqa else 1
    return t.reshape(batch, heads, *t.shape[-2:])


def _translate(
    card: Card, attn_mask: Any, q: Tensor, k: Tensor, lead: tuple[int, ...]
) -> dict[str, Tensor]:
    """The mask as an argument of the card's op: `key_mask`, `bias` or `key_bias`."""
    mask = _mask(attn_mask, (*lead, q.shape[2], k.shape[2]), q)
    B, S = q.shape[0], k.shape[2]
    same_heads, same_queries = mask.shape[1] == 1, mask.shape[2] == 1
    boolean = mask.dtype == torch.bool
    if boolean and same_heads and same_queries and card.accepts("key_mask"):
        return {"key_mask": mask[:, 0, 0].expand(B, S)}
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    added = torch.where(mask, zero, -torch.inf) if boolean else mask
    if card.accepts("bias"):
        return {"bias": added}
    if same_queries and card.accepts("key_bias"):
        return {"key_bias": added[:, :, 0].expand(B, -1, S)}
    accepted = "None"
    if card.accepts("key_bias"):
        accepted = "the same for all queries"
    elif card.accepts("key_mask"):
        accepted = "bool, the same for all queries and heads,"
    hint = "" if same_queries else " (for a causal mask: is_causal=True)"
    accepted += f" with mechanism {card.name!r}{hint}"
    raise reject(OP, "attn_mask", accepted, attn_mask)


def _mask(mask: Any, full: tuple[int, ...], q: Tensor) -> Tensor:
    """[B or 1, H or 1, T or 1, S]."""
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, *FLOATS):
        raise reject(OP, "attn_mask", "a bool or floating-point tensor", mask, kind=TypeError)
    shape = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    fits = len(shape) == len(full) and all(
        size in (1, whole) for size, whole in zip(shape, full, strict=True)
    )
    if not fits or mask.device != q.device:
        raise reject(OP, "attn_mask", f"broadcastable to {list(full)} on {q.device}", mask)
    mask = mask.reshape(shape).expand(*shape[:-1], full[-1])
    if len(full) == 2:
        return mask[None, None]
    if len(full) == 3:
        return mask[:, None] if q.shape[1] == 1 and q.shape[0] == full[0] else mask[None]
    batch = shape[:-3]
    if math.prod(batch) != 1:
        batch = full[:-3]
    mask = mask.expand(*batch, *shape[-3:-1], full[-1])
    return mask.reshape(math.prod(batch), *mask.shape[-3:])


def _check_options(card: Card, options: dict[str, Any], tensors: bool) -> None:
    takes = {name for name in inspect.signature(card.op).parameters if name not in OWN}
    for name, value in options.items():
        if name in OWN:
            raise reject(OP, name, "left out", words(f"it: use {OWN[name]}"))
        if name not in takes:
            accepted = f"an argument of {card.op.__name__} ({', '.join(sorted(takes))})"
            raise reject(
                OP, name, accepted, words(f"{name!r}{nearest(name, takes)}"), kind=TypeError
            )
        if isinstance(value, Tensor) and not tensors:
            accepted = "no tensor, unless inputs have four dimensions and a causal call has T = S"
            raise reject(OP, name, accepted, value)
    missing = [item.name for item in card.operands if item.name not in options]
    if missing:
        accepted = f"given for mechanism {card.name!r}"
        raise reject(OP, ", ".join(missing), accepted, words("nothing"), kind=TypeError)
