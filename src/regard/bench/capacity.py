"""How many pairs of a key and a value a mechanism can hold, without any training.

n random keys are written with n random values; then every key is asked for. Its value is recalled
if the answer is nearer to it than to any other value. Keys and queries are multiplied by factors,
the best of a few, as a trained layer would choose them; gates stand where nothing is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import regard
from regard.core.state import FixedState

COUNTS = (4, 8, 16, 32, 64, 128, 256, 512)
ENOUGH = 0.95  # of the values recalled
FACTORS = (1.0, 4.0, 16.0)
HEADS = 8  # draws
STEPS = (0.25, 0.5, 1.0)  # of the delta rules: a whole one overwrites what is near
GATES = (0.5, 0.8, 0.95)  # of RAT's averages, which hold most if neither too short nor too long


def recalled(
    mechanism: str, count: int, *, dim: int = 64, options: Mapping[str, Any] | None = None
) -> float:
    """The share of `count` values that is recalled, at the best factors.

    >>> recalled("softmax", 16, dim=32), recalled("linear", 64, dim=16) < 0.5
    (1.0, True)
    """
    made = torch.Generator().manual_seed(23)
    keys = normalize(torch.randn(1, HEADS, count, dim, generator=made), dim=3)
    values = torch.randn(1, HEADS, count, dim, generator=made).sign()
    # The pairs first, then every key as a query; those later tokens write nothing.
    asked, padding = torch.cat([keys, keys], 2), torch.zeros_like(values)
    written = torch.cat([values, padding], 2)
    mask = (torch.arange(2 * count) < count).expand(1, -1)
    op, best = regard.mechanisms[mechanism].op, 0.0
    for factors in product(FACTORS, FACTORS):
        for gates in _gates(mechanism, asked):
            q, k = (asked * dim**0.5 * factor for factor in factors)
            with torch.no_grad():
                out = op(q, k, written, causal=True, key_mask=mask, **dict(options or {}), **gates)
            answers = out[:, :, count:]
            nearest = torch.cdist(normalize(answers, dim=3), normalize(values, dim=3)).argmin(3)
            best = max(best, float((nearest == torch.arange(count)).float().mean()))
            if best == 1.0:
                return best
    return best


def capacity(mechanism: str, *, dim: int = 64, options: Mapping[str, Any] | None = None) -> int:
    """The largest of `COUNTS` of which 95 % and more are recalled; 0 if there is none."""
    held = 0
    for count in COUNTS:
        if recalled(mechanism, count, dim=dim, options=options) < ENOUGH:
            break
        held = count
    return held


def state_size(
    mechanism: str, *, dim: int = 64, options: Mapping[str, Any] | None = None
) -> int | None:
    """Numbers of the state of one head, whatever came before; None where it grows.

    >>> state_size("lightning", dim=16), state_size("softmax")
    (256, None)
    """
    card, sizes = regard.mechanisms[mechanism], set()
    for count in (2, 70):
        q = torch.ones(1, 1, count, dim)
        gates = _gates(mechanism, q)[0]
        with torch.no_grad():
            _, state = card.op(
                q, q, q, causal=True, return_state=True, **dict(options or {}), **gates
            )
        if not isinstance(state, FixedState):
            return None
        sizes.add(sum(x.numel() for x in state.tensors.values()))
    return sizes.pop() if len(sizes) == 1 else None


def _gates(mechanism: str, keys: Tensor) -> list[dict[str, Tensor]]:
    ones = torch.ones(keys.shape[:3])
    if mechanism == "delta":
        return [{"beta": step * ones} for step in STEPS]
    if mechanism == "gated_delta":
        return [{"beta": step * ones, "log_decay": 0.0 * ones} for step in STEPS]
    if mechanism == "rat":
        return [{"gate": torch.full_like(keys, gate)} for gate in GATES]
    return [{}]
