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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    walk: Walk | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, E] and the state after all keys.

    With `walk` (a causal form) the queries are aligned with the last keys: keys before the
    first query enter the state first, and queries before the first key read the state as it
    came in. Without, every query reads the last state.
    """
    T, S = q.shape[2], k.shape[2]
    if walk is None:
        state = encode(k, v, log_decay, state)
        return read(q, state), state
    lead, together = max(0, T - S), min(T, S)
    early, late = _split(S - together, k, v, log_decay)
    if early[0].shape[2] or state is None or together == 0:
        state = encode(*early, state)
    rows = [read(q[:, :, :lead], state)] if lead else []
    if together:
        out, state = walk(q[:, :, lead:], *late, state)
        rows.append(out)
    if not rows:
        return read(q, state), state
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2), state


def _split(
    at: int, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]:
    decays = (None, None) if log_decay is None else (log_decay[..., :at], log_decay[..., at:])
    early = (k[:, :, :at], v[:, :, :at], decays[0])
    return early, (k[:, :, at:], v[:, :, at:], decays[1])
