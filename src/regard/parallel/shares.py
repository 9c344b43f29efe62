"""Which part of a sequence belongs to which rank. Nothing here communicates."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from regard.core.checks import check_integer, reject


def span(length: int, rank: int, size: int) -> tuple[int, int]:
    """Tokens [start, stop) of a rank: equal parts, the first ones a token longer if need be.

    >>> [span(10, rank, 4) for rank in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    check_integer("span", "length", length, least=0)
    check_integer("span", "size", size)
    check_integer("span", "rank", rank, least=0)
    if rank >= size:
        raise reject("span", "rank", f"below size={size}", rank)
    part, more = divmod(length, size)
    start = rank * part + min(rank, more)
    return start, start + part + (rank < more)


def share(x: Tensor, rank: int, size: int, *, axis: int = 2) -> Tensor:
    """What a rank holds of a whole tensor, a view: `span` along the axis of the sequence.

    The axis is 2 for q, k, v, log_decay and beta, and 1 for a key_mask.

    >>> import torch
    >>> share(torch.arange(5), 1, 2, axis=0)
    tensor([3, 4])
    """
    start, stop = span(x.shape[axis], rank, size)
    return x.narrow(axis, start, stop - start)


def share_boundaries(
    cu_seqlens: Int[Tensor, " n"], rank: int, size: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """cu_seqlens of a whole pack -> (cu_seqlens, cu_seqlens_k) of a rank with gathered keys.

    For exact attention after `gather_sequence(..., until_own=True)`: the queries are this rank's
    share, the keys all from the beginning to its end. Sequences without a query here keep their
    keys and cost nothing. The length of the pack is read on the host.

    >>> import torch
    >>> cu = torch.tensor([0, 3, 10], dtype=torch.int32)
    >>> share_boundaries(cu, 1, 2)
    (tensor([0, 0, 5], dtype=torch.int32), tensor([ 0,  3, 10], dtype=torch.int32))
    """
    start, stop = span(int(cu_seqlens[-1]), rank, size)
    return cu_seqlens.clamp(start, stop) - start, cu_seqlens.clamp(max=stop)
