"""The engine of every mechanism with a state of fixed size: S <- decay o S + k v^T, read by q.

It works on *features*: k [B, Hk, S, F] and q [B, H, T, F] are already mapped, F need not be the
head size, and v [B, Hk, S, E] may carry extra columns. A normaliser is a column of ones in v:
its output column is the sum of weights. Masked keys are zeros with no decay. Grouped queries
(H a multiple of Hk) are rows of a product, so nothing is repeated. The state is [B, Hk, F, E].

`log_decay` [B, Hk, S], or [B, Hk, S, F] for every channel of a key on its own, or None, is the
logarithm of what a token multiplies the past by before it writes; minus infinity forgets exactly,
in value and gradient.

A mechanism with another state (Mesa's two sums) brings a `Rule` of its own to `follow`. All
others describe a `Problem`; `by_rule` makes a solver of problems from a rule on features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.ops.linear.decays import decays_to_end
from regard.ops.linear.normaliser import mean
from regard.ops.linear.problem import Problem, Solution, Solve, each_sequence, featured

# o, state = walk(q, k, v, log_decay, state), for as many queries as keys, query t at key t.
Walk = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def encode(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> Tensor:
    """The state after all keys, [B, Hk, F, E]: one product, whatever the decay."""
    if log_decay is None:
        new = k.mT @ v
        return new if state is None else state + new
    per_channel = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    leaving, whole, seen, kept = decays_to_end(per_channel, k.dtype)
    new = torch.where(seen, k * leaving, 0.0).mT @ v
    if state is None:
        return new
    return torch.where(kept[..., None], state * whole[..., None], 0.0) + new


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


def by_rule(rule_of: Callable[[Problem], Rule]) -> Solve:
    """A solver of problems from a rule on features: the keys are k, v, (beta,) log_decay.

    The sum of weights is a column of ones in v, so a rule knows nothing of the normaliser.
    """

    def solve(problem: Problem) -> Solution:
        problem = featured(problem)
        normalised, v, state = problem.normaliser is not None, problem.v, problem.S
        if normalised:
            v = pad(v, (0, 1), value=1.0)
            if state is not None:
                assert problem.z is not None
                state = torch.cat([state, problem.z[..., None]], 3)
        others = (problem.log_decay,) if problem.beta is None else (problem.beta, problem.log_decay)
        out, state = follow(rule_of(problem), problem.q, (problem.k, v, *others), state)
        if not normalised:
            return Solution(out, state)
        out = mean(out, problem.minimum, problem.epsilon)
        if not problem.wants_state:
            return Solution(out)
        return Solution(out, state[..., :-1].contiguous(), state[..., -1].contiguous())

    return each_sequence(solve)
