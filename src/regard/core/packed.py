"""Packed sequences: many of different lengths laid end to end in one batch row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.checks import Sizes, reject, words


class Span(NamedTuple):
    """One sequence: queries [t0, t1) and keys [s0, s1)."""

    t0: int
    t1: int
    s0: int
    s1: int


def check_packed(
    op: str, cu_seqlens: Any, cu_seqlens_k: Any, sizes: Sizes, state: Any = None
) -> None:
    """Metadata of `cu_seqlens` (int32 [n + 1], B = 1) and of `cu_seqlens_k`, which may be None."""
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise reject(op, "cu_seqlens_k", "given together with cu_seqlens", words("it alone"))
        return
    for name, value in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if value is None:
            continue
        integral = isinstance(value, Tensor) and value.dtype == torch.int32 and value.dim() == 1
        if not integral or len(value) < 1:
            raise reject(op, name, "an int32 tensor [sequences + 1]", value, kind=TypeError)
    if cu_seqlens_k is not None and len(cu_seqlens_k) != len(cu_seqlens):
        accepted = f"of cu_seqlens' length {len(cu_seqlens)}"
        raise reject(op, "cu_seqlens_k", accepted, cu_seqlens_k)
    if cu_seqlens_k is None and sizes.T != sizes.S:
        raise reject(op, "cu_seqlens_k", "given when T != S", None)
    if sizes.B != 1:
        accepted = "of batch size 1 with packed sequences"
        raise reject(op, "q", accepted, words(f"batch size {sizes.B}"))
    if state is not None:
        raise reject(op, "state", "None with packed sequences", words("a state"))


def spans(op: str, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, sizes: Sizes) -> list[Span]:
    """The sequences as host integers (one synchronisation on a GPU), bounds checked."""
    ends_q = _boundaries(op, "cu_seqlens", cu_seqlens, sizes.T)
    if cu_seqlens_k is None:
        ends_k = ends_q
    else:
        ends_k = _boundaries(op, "cu_seqlens_k", cu_seqlens_k, sizes.S)
    pairs = zip(pairwise(ends_q), pairwise(ends_k), strict=True)
    return [Span(*queries, *keys) for queries, keys in pairs]


def _boundaries(op: str, name: str, offsets: Tensor, total: int) -> list[int]:
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in pairwise(ends)):
        shown = str(ends) if len(ends) <= 8 else f"[{', '.join(map(str, ends[:8]))}, …, {ends[-1]}]"
        raise reject(op, name, f"non-decreasing from 0 to the length {total}", words(shown))
    return ends


def run_packed(
    one: Callable[..., Any],
    sequences: list[Span],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_side: dict[str, tuple[Tensor | None, int]],
    key_side: dict[str, tuple[Tensor | None, int]],
) -> Any:
    """`one(q, k, v, **operands)` on each sequence, joined again: packed equals separate, exactly.

    `query_side` and `key_side` map an operand to (tensor or None, the axis of its length).
    `one` returns a tensor, or a tuple of tensors, with the queries on axis 2; so does this.
    """
    outputs = []
    for t0, t1, s0, s1 in sequences or [Span(0, 0, 0, 0)]:
        operands = {
            name: None if value is None else value.narrow(axis, lo, hi - lo)
            for side, lo, hi in ((query_side, t0, t1), (key_side, s0, s1))
            for name, (value, axis) in side.items()
        }
        outputs.append(one(q[:, :, t0:t1], k[:, :, s0:s1], v[:, :, s0:s1], **operands))
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(parts, 2) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs, 2)
