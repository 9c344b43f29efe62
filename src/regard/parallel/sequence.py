"""One sequence over the ranks of a group: every rank runs the op on its part of it.

1. The op, without queries, turns the tokens of this rank into a state from nothing.
2. `scan` turns these states, and what each rank leaves of the past, into the state that the
   sequence has when it reaches this rank: the only communication.
3. The op runs on this rank's tokens with that state, as in decoding.

Where sequences are packed, the first piece of a rank continues what reached it, those inside are
whole, and the last piece is what goes on to the next rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.checks import Sizes, check_flag, check_qkv, check_state, reject, words
from regard.core.packed import check_packed, spans
from regard.core.state import FixedState
from regard.parallel.collectives import Group, lengths, place
from regard.parallel.scan import Part, scan
from regard.parallel.shares import span

Operands = Mapping[str, Any]  # of keys, by name: tensors or None


class Rule(NamedTuple):
    """A mechanism with a state of fixed size, as this module needs it.

    run(q, k, v, operands, causal, state, return_state, cu_seqlens) is its op; encode(k, v,
    operands, state) -> the state after these keys and what they leave of the past.
    """

    op: str
    run: Callable[..., Any]
    encode: Callable[[Tensor, Tensor, Operands, FixedState | None], Encoded]


class Encoded(NamedTuple):
    """The state after some keys; W of `regard.parallel.scan`; whether W is a matrix."""

    state: FixedState
    left: Tensor
    transition: bool = False


def attend(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    *,
    group: Group,
    causal: bool,
    cu_seqlens: Tensor | None,
    state: FixedState | None,
    return_state: bool,
) -> Any:
    """What the op gives for this rank's tokens of the whole sequence, and its last state."""
    rank, size = place(rule.op, group)
    if size == 1:
        return rule.run(q, k, v, operands, causal, state, return_state, cu_seqlens)
    sizes = check_qkv(rule.op, q, k, v)
    for name, flag in (("causal", causal), ("return_state", return_state)):
        check_flag(rule.op, name, flag)
    check_state(rule.op, state, FixedState)
    if causal and sizes.T != sizes.S:
        raise reject(rule.op, "q", f"of as many tokens as k with causal=True, {sizes.S}", q)
    cuts: list[int] = []
    if cu_seqlens is not None:
        if not causal:
            raise reject(rule.op, "cu_seqlens", "None without causal=True", words("a tensor"))
        if return_state:
            raise reject(rule.op, "return_state", "False with packed sequences", return_state)
        cuts = _cuts(rule.op, cu_seqlens, sizes, state, rank, size)

    # The tokens after the last cut go on to the next rank, and nothing before it does.
    last = cuts[-1] if cuts else 0
    first = state if rank == 0 else None  # the sequence begins here
    found = rule.encode(*_tokens(slice(last, None), k, v, operands), first)
    left, new = found.left, _matrix(found.state)
    if cuts:
        left = torch.zeros_like(left)
    if torch.is_grad_enabled() and _learns(q, k, v, *operands.values()):
        # The backward pass communicates, so it has to happen on every rank or on none.
        new = new if new.requires_grad else new.detach().requires_grad_()
    before, after = scan(
        Part(left, new, found.transition), rank, group,
        before=causal, after=return_state or not causal,
    )  # fmt: skip

    if not causal:
        none = _tokens(slice(0, 0), k, v, operands)
        out = rule.run(q, *none, False, _state(found.state, after), False, None)
    else:
        reached = _state(found.state, before)
        if rank == 0 and state is not None:  # `before` is zeros here
            reached = _state(state, _matrix(state) + before)
        out = _run(rule, q, k, v, operands, reached, cuts)
        out = _Joined.apply(out, before)
    if not return_state:
        return out
    total = sum(lengths(sizes.S, k, group))  # the state that came in counts on the first rank
    past = lengths(0 if first is None else first.length, k, group)[0]
    return out, _state(found.state, after, past + total)


def _run(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, operands: Operands, state: Any, cuts: list[int]
) -> Tensor:
    """The op on this rank: the piece before the first cut continues `state`."""
    first = cuts[0] if cuts else q.shape[2]
    head = slice(0, first)
    out = rule.run(q[:, :, head], *_tokens(head, k, v, operands), True, state, False, None)
    if not cuts:
        return out
    ends = [cut - first for cut in (*cuts, q.shape[2])]
    inside = torch.tensor(ends, dtype=torch.int32, device=q.device)
    rest = slice(first, None)
    whole = rule.run(q[:, :, rest], *_tokens(rest, k, v, operands), True, None, False, inside)
    return torch.cat([out, whole], 2)


def _cuts(op: str, cu_seqlens: Tensor, sizes: Sizes, state: Any, rank: int, size: int) -> list[int]:
    """Where sequences of the pack begin among the tokens of this rank."""
    check_packed(op, cu_seqlens, None, sizes, state)
    total = int(cu_seqlens[-1])
    start, stop = span(max(0, total), rank, size)
    if stop - start != sizes.S:
        accepted = f"tokens [{start}, {stop}) of the {total} that cu_seqlens has"
        raise reject(op, "k", accepted, words(f"{sizes.S} tokens"))
    whole = sizes.__class__(*(1, sizes.H, sizes.Hk, total, total, sizes.D, sizes.Dv))
    begins = sorted({sequence.s0 for sequence in spans(op, cu_seqlens, None, whole)})
    here = begins[bisect_left(begins, start) : bisect_left(begins, stop)]
    return [begin - start for begin in here]


def _tokens(
    part: slice, k: Tensor, v: Tensor, operands: Operands
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The key side of some tokens; a key_mask [B, S] has its tokens on axis 1."""
    cut = {
        name: x if x is None else x[:, part] if name == "key_mask" else x[:, :, part]
        for name, x in operands.items()
    }
    return k[:, :, part], v[:, :, part], cut


def _learns(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


# -- states as one matrix [B, Hk, F, C] ----------------------------------------------------------


def _matrix(state: FixedState) -> Tensor:
    """All tensors of a state side by side: S [B, Hk, F, E], and z [B, Hk, F] as a column."""
    columns = [x.unsqueeze(3) if x.dim() == 3 else x for x in state.tensors.values()]
    return columns[0] if len(columns) == 1 else torch.cat(columns, 3)


def _state(like: FixedState, matrix: Tensor, length: int | None = None) -> FixedState:
    """The inverse of `_matrix`."""
    widths = [1 if x.dim() == 3 else x.shape[3] for x in like.tensors.values()]
    parts = matrix.split(widths, 3)
    tensors = {
        name: (part.squeeze(3) if x.dim() == 3 else part).contiguous()
        for (name, x), part in zip(like.tensors.items(), parts, strict=True)
    }
    return FixedState(like.mechanism, like.length if length is None else length, tensors)


class _Joined(torch.autograd.Function):
    """`out` itself, so that its gradient always goes through the scan: with a rank that has no
    token, or whose tokens do not look back, the others would wait for it for ever."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, before: Tensor) -> Tensor:
        ctx.save_for_backward(before)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (before,) = ctx.saved_tensors
        return gradient, torch.zeros_like(before)
