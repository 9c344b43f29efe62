"""How exact a call is: its output and gradients against the float64 reference of the card.

A reference holds what a fast form avoids, so at long lengths it is evaluated for some queries of
one head: of a causal call a block of queries with only the keys before its end, at the beginning,
in the middle and at the end. That this is the same as the whole is not taken for granted but
tried at a short length first; a mechanism that mixes its queries fails there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from regard.bench.measure.memory import available
from regard.bench.timing.contestants import Contestant
from regard.bench.timing.fit import readable
from regard.bench.timing.setting import Setting
from regard.core.budgets import relative_error
from regard.core.card import Card
from regard.testing.calls import Call

WHOLE = 256  # queries up to which the whole of one head is compared
ROWS = 8  # of one block
TRIAL = 67
MOST = 2**32  # bytes for a reference
Blocks = tuple[tuple[int, int], ...]  # queries [start, stop)


@dataclass(frozen=True)
class Accuracy:
    """Relative errors, and which part of the call was compared; None with the reason why not."""

    error: float | None
    gradient_error: float | None
    compared: str


def accuracy(contestant: Contestant, call: Call, out: Tensor) -> Accuracy:
    """Judges `out`, what the call returned; with a backward pass, makes it again for gradients."""
    setting = contestant.setting
    length = call.size("t")
    blocks = blocks_of(length, setting.causal)
    if length > WHOLE:
        if not rows_are_independent(contestant):
            words = f"outputs depend on other queries, and the reference of all {length} is large"
            return Accuracy(None, None, f"not compared: {words}")
        reach = _reach(contestant)
        if setting.causal:
            blocks = tuple(block for block in blocks if block[1] <= reach) or blocks[:1]
        elif length > reach:
            need = readable(length * _per_key(contestant))
            return Accuracy(None, None, f"not compared: the reference would take {need}")
    compared = _words(length, blocks, setting)

    exact = one_head(call).to(torch.float64)
    exact = exact.leaves() if setting.backward else exact
    with torch.set_grad_enabled(setting.backward):
        expected = reference_rows(contestant.reference, exact, blocks, setting.causal)
    error = relative_error(_rows(out[:1, :1], blocks), expected)
    if not setting.backward:
        return Accuracy(error, None, compared)

    leaves = call.leaves()
    with torch.enable_grad():
        out = contestant.forward(leaves)
    generator = torch.Generator().manual_seed(setting.seed)
    weight = torch.randn(expected.shape, generator=generator).to(expected)
    cotangent, at = torch.zeros_like(out), 0
    for start, stop in blocks:  # no other query sends a gradient back
        cotangent[:1, :1, start:stop] = weight[:, :, at : at + stop - start].to(out.dtype)
        at += stop - start
    weight = _rows(cotangent[:1, :1], blocks).double()
    names = ("q", "k", "v")
    actual = torch.autograd.grad(out, [leaves[name] for name in names], cotangent)
    wanted = torch.autograd.grad(expected, [exact[name] for name in names], weight)
    pairs = zip(actual, wanted, strict=True)
    worst = max(relative_error(own[:1, :1], other) for own, other in pairs)
    return Accuracy(error, worst, compared)


def blocks_of(length: int, causal: bool) -> Blocks:
    """The queries that are compared: [start, stop) of each block.

    >>> blocks_of(1000, True), blocks_of(1000, False)
    (((0, 8), (496, 504), (992, 1000)), ((488, 512),))
    """
    if length <= WHOLE:
        return ((0, length),)
    middle = length // 2
    if not causal:  # all queries see the same keys
        return ((middle - 3 * ROWS // 2, middle + 3 * ROWS // 2),)
    return (0, ROWS), (middle - ROWS // 2, middle + ROWS // 2), (length - ROWS, length)


def reference_rows(card: Card, call: Call, blocks: Blocks, causal: bool) -> Tensor:
    """The reference at these queries, one after the other; every block is a call of its own."""
    known = inspect.signature(card.reference).parameters
    parts = []
    for start, stop in blocks:
        part = call.narrow("t", start, stop)
        if causal:
            part = part.narrow("s", 0, stop)
        named = {name: value for name, value in part.arguments.items() if name in known}
        parts.append(card.reference(**named))
    return torch.cat(parts, 2)


def one_head(call: Call) -> Call:
    """The first head of the first batch row."""
    return call.narrow(("b",), 0, 1).narrow(("h",), 0, 1).narrow(("hk",), 0, 1)


@cache
def rows_are_independent(contestant: Contestant) -> bool:
    """Whether blocks of queries on their own give what they give among all others."""
    small = replace(contestant, setting=replace(contestant.setting, dtype="float64"))
    card, call = contestant.reference, one_head(small.call(TRIAL))
    blocks, causal = ((0, 5), (31, 36), (TRIAL - 5, TRIAL)), contestant.setting.causal
    with torch.no_grad():
        whole = reference_rows(card, call, ((0, TRIAL),), causal)
        try:
            parts = reference_rows(card, call, blocks, causal)
        except (IndexError, RuntimeError, TypeError, ValueError):  # a plan that cannot be cut
            return False
    return relative_error(parts, _rows(whole, blocks)) < 1e-9


def _words(length: int, blocks: Blocks, setting: Setting) -> str:
    """Which part of the call is compared."""
    head = f"one head of {setting.heads}" if setting.heads > 1 else "the one head"
    count = sum(stop - start for start, stop in blocks)
    if count == length:
        return f"all queries of {head}"
    if not setting.causal:
        return f"{count} queries of {head}"
    last = blocks[-1][1]
    reach = "from the first to the last" if last == length else f"only up to position {last}"
    return f"{count} queries of {head}, {reach}"


def _rows(out: Tensor, blocks: Blocks) -> Tensor:
    return torch.cat([out[:, :, start:stop] for start, stop in blocks], 2)


def _reach(contestant: Contestant) -> int:
    """The most keys whose reference is affordable."""
    free = available(contestant.setting.device)
    most = MOST if free is None else min(MOST, free // 2)
    return max(WHOLE, most // _per_key(contestant))


def _per_key(contestant: Contestant) -> int:
    """Bytes that a reference may keep per key: a few D x D matrices, more with gradients."""
    setting = contestant.setting
    return 3 * 8 * setting.dim**2 * (3 if setting.backward else 1)
