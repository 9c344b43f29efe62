"""Keys and values of other ranks, for mechanisms whose past does not fit into a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.core.checks import check_flag
from regard.parallel.collectives import Group, gather, lengths, place, sum_and_scatter


def gather_sequence(
    x: Tensor, *, axis: int = 2, group: Group = None, until_own: bool = False
) -> Tensor:
    """The parts of all ranks, joined along `axis` in the order of the ranks.

        whole = [x of rank 0, x of rank 1, ...]

    With `until_own` only up to the end of this rank's part: what a causal query here may see.
    Exact attention is then the op itself, whose last query stands at the last key:

        k, v = (gather_sequence(x, until_own=True) for x in (k, v))
        out = regard.ops.local_linear_attention(q, k, v, causal=True)

    Parts may differ in length along `axis` and in nothing else. A `key_mask` has its tokens on
    axis 1; packs: `regard.parallel.share_boundaries`.

    Gradients are exact: the backward pass adds up over ranks, in float32 for 16-bit tensors,
    what they did with this rank's part. It communicates, so every rank calls it or none; the
    loss is the sum of what all ranks compute.

    Cost: every rank receives and holds the whole, in the forward pass, and sends as much
    backwards. Causal work is not balanced: the last of P ranks does 2 - 1 / P times the mean.
    Limits: differentiable once; a GPU waits for the lengths.
    Raises: RuntimeError without `torch.distributed`.
    """
    rank, _ = place("gather_sequence", group)
    check_flag("gather_sequence", "until_own", until_own)
    return _Gather.apply(x, axis, rank, group, until_own)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, rank: int, group: Group, until_own: bool) -> Tensor:
        front = x.movedim(axis, 0)
        counts = lengths(front.shape[0], x, group)
        most = max(counts)
        padded = front.new_zeros(most, *front.shape[1:])
        padded[: front.shape[0]] = front
        as_bytes = padded.to(torch.uint8) if x.dtype == torch.bool else padded
        rows = [row.to(x.dtype) for (row,) in gather([as_bytes], group)]
        used = counts[: rank + 1] if until_own else counts
        ctx.axis, ctx.group, ctx.counts, ctx.rank, ctx.used = axis, group, counts, rank, len(used)
        return torch.cat([r[:n] for r, n in zip(rows, used, strict=False)]).movedim(0, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        front, most = gradient.movedim(ctx.axis, 0), max(ctx.counts)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        padded = front.new_zeros(len(ctx.counts), most, *front.shape[1:], dtype=wide)
        at = 0
        for row, count in zip(padded, ctx.counts[: ctx.used], strict=False):
            row[:count] = front[at : at + count]
            at += count
        own = sum_and_scatter(padded.flatten(0, 1), ctx.group)[: ctx.counts[ctx.rank]]
        return own.to(gradient.dtype).movedim(0, ctx.axis), None, None, None, None
