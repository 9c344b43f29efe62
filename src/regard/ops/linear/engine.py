"""The engine of every mechanism with a state of fixed size: S <- decay o S + k v^T, read by q.

It works on *features*: k [B, Hk, S, F] and q [B, H, T, F] are already mapped, F need not be the
head size, and v [B, Hk, S, E] may carry extra columns. A normaliser is a column of ones in v:
its output column is the sum of weights. Masked keys are zeros with no decay. Grouped queries
(H a multiple of Hk) are rows of a product, so nothing is repeated. The state is [B, Hk, F, E].

`log_decay` [B, Hk, S], or None, is the logarithm of what a token multiplies the past by before
it writes; minus infinity forgets exactly, in value and gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.linear.decays import decays_to_end

# o, state = walk(q, k, v, log_decay, state), for as many queries as keys, query t at key t.
Walk = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def encode(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> Tensor:
    """The state after all keys, [B, Hk, F, E]: one product, whatever the decay."""
    if log_decay is None:
        new = k.mT @ v
        return new if state is None else state + new
    leaving, whole, seen, kept = decays_to_end(log_decay, k.dtype)
    new = torch.where(seen[..., None], k * leaving[..., None], 0.0).mT @ v
    if state is None:
        return new
    return torch.where(kept[..., None, None], state * whole[..., None, None], 0.0) + new


def read(q: Tensor, state: Tensor) -> Tensor:
    """Every query reads the same state: o [B, H, T, E]."""
    (B, H, T, F), (_, Hk, _, E) = q.shape, state.shape
    return (q.reshape(B, Hk, H // Hk * T, F) @ state).reshape(B, H, T, E)


class Rule(NamedTuple):
    """What differs between mechanisms with a state; `keys` are tensors with S on axis 2, or None.

    encode(*keys, state) -> the state after all keys, from `state` or, for None, from nothing;
    read(q, state) -> o, every query reading that state;
    walk(q, *keys, state) -> o and state for as many queries as keys, or None: not causal.
    """

    encode: Callable[..., Tensor]
    read: Callable[[Tensor, Tensor], Tensor]
    walk: Callable[..., tuple[Tensor, Tensor]] | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    walk: Walk | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, E] and the state after all keys, by the rule of this module.

    With `walk` (a causal form) the queries are aligned with the last keys. Without, every query
    reads the last state.
    """
    return follow(Rule(encode, read, walk), q, (k, v, log_decay), state)


def follow(
    rule: Rule, q: Tensor, keys: tuple[Tensor | None, ...], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and the state after all keys, by any rule; `keys[0]` is a tensor.

    With a walk the queries are aligned with the last keys: keys before the first query enter
    the state first, and queries before the first key read the state as it came in.
    """
    assert keys[0] is not None
    T, S = q.shape[2], keys[0].shape[2]
    if rule.walk is None:
        state = rule.encode(*keys, state)
        return rule.read(q, state), state
    lead, together = max(0, T - S), min(T, S)
    early = _cut(keys, slice(None, S - together))
    if S - together or state is None or together == 0:
        state = rule.encode(*early, state)
    rows = [rule.read(q[:, :, :lead], state)] if lead else []
    if together:
        out, state = rule.walk(q[:, :, lead:], *_cut(keys, slice(S - together, None)), state)
        rows.append(out)
    if not rows:
        return rule.read(q, state), state
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2), state


def _cut(keys: tuple[Tensor | None, ...], tokens: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x[:, :, tokens] for x in keys)
