"""Maps of blocks from means of queries and keys, or from what the last queries look at."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard.core.accumulate import sums_by
from regard.core.checks import check_choice, check_integer, check_number, check_qkv, reject
from regard.core.precision import compute_dtype

KINDS = ("topk", "a", "vertical_slash", "vertical_slash_block")
OP = "block_mask"


def block_mask(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk t d"],
    *,
    kind: str = "a",
    count: int | None = None,
    density: float = 0.125,
    block_q: int = 128,
    block_k: int = 32,
    vertical: float = 0.5,
) -> Int[Tensor, "b h nq nk"]:
    """Which blocks of keys each block of queries attends to: 1 or 0, for `block_sparse_attention`.

        mask_ij = 1 if block j is among the best `count` by score_ij, or always there for kind

    "topk": the `count` blocks whose mean key has the largest product with the mean query; also
        future ones, which attention then hides.
    "a": the first block, the last that the query block reaches, and the best between them.
    "vertical_slash": the columns and diagonals (distances) with most weight in the attention of
        the last block of queries vote for blocks; the first and the last are always there.
    "vertical_slash_block": the same from block means, and the diagonal is always there.

    Except for "topk", query blocks that reach no more than `count` blocks get all of them.

    Args:
        q, k: [B, H, T, D], [B, Hk, T, D] of one sequence.
        count: blocks of keys per block of queries; None: density of all, at least 1.
        vertical: share of the budget for columns, the rest for diagonals.

    Returns: int8 [B, H, ceil(T / block_q), ceil(T / block_k)].

    Precision: float32 (float64 for float64 inputs).
    Cost: O(T^2 D / (block_q block_k)), and for "vertical_slash" O(T block_q D).
    Source: DHSA, arXiv 2510.24606, second version of the code; masks equal, bit for bit.
    Limits: one sequence, no key mask. Where the length is no multiple of both blocks, means count
        zeros behind the last token, as in the authors' code. Without "topk" each query sees a key.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> q, k = torch.randn(2, 1, 2, 512, 16)
    >>> block_mask(q, k, count=4).sum(3)[0, 0].tolist()
    [4, 4, 4, 4]
    """
    sizes = check_qkv(OP, q, k, k)
    if sizes.T != sizes.S:
        raise reject(OP, "k", f"of q's length {sizes.T}", k)
    check_choice(OP, "kind", kind, KINDS)
    for name, value in {"block_q": block_q, "block_k": block_k}.items():
        check_integer(OP, name, value)
    for name, share in {"density": density, "vertical": vertical}.items():
        check_number(OP, name, share, least=0.0)
        if share > 1:
            raise reject(OP, name, "at most 1", share)
    dtype, whole = compute_dtype(q.dtype), math.lcm(block_q, block_k)
    length = -(-sizes.T // whole) * whole
    nq, nk = length // block_q, length // block_k
    if count is None:
        count = max(1, int(density * nk))
    check_integer(OP, "count", count)
    shown = slice(-(-sizes.T // block_q)), slice(-(-sizes.T // block_k))
    if not length or not sizes.B * sizes.H:
        return torch.zeros(sizes.B, sizes.H, 0, 0, dtype=torch.int8, device=q.device)
    with torch.no_grad():
        q, k = (pad(x.to(dtype), (0, 0, 0, length - sizes.T)) for x in (q, k))
        k = k.repeat_interleave(sizes.group, 1)
        grid = _Grid(block_q, block_k, nq, nk, min(count, nk), q.device)
        found = _MAKE[kind](q, k, grid, vertical)
    return found[:, :, shown[0], shown[1]].to(torch.int8)


class _Grid(NamedTuple):
    """Sizes, and `recent`: the last block of keys that each block of queries reaches."""

    block_q: int
    block_k: int
    nq: int
    nk: int
    count: int
    device: torch.device

    @property
    def recent(self) -> Tensor:
        """The block of keys in which each row of blocks ends, [nq, 1]."""
        rows = torch.arange(self.nq, device=self.device) + 1
        return ((rows * self.block_q - 1) // self.block_k).clamp(max=self.nk - 1)[:, None]

    @property
    def columns(self) -> Tensor:
        """The numbers of the blocks of keys."""
        return torch.arange(self.nk, device=self.device)

    def dense(self, budget: int) -> Tensor:
        """Rows [nq, 1] that see all: those within the budget of tokens, and the last."""
        row = torch.arange(self.nq, device=self.device)[:, None]
        early = (self.recent + 1 <= self.count) | (row < -(-budget // self.block_q))
        return early | (row == self.nq - 1)

    def means(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of the blocks of queries and of keys."""
        rows = q.unflatten(2, (self.nq, self.block_q)).mean(3)
        return rows, k.unflatten(2, (self.nk, self.block_k)).mean(3)

    def best(self, scores: Tensor, forced: Tensor, dense: Tensor) -> Tensor:
        """`forced`, filled up to `count` from blocks 1 .. recent - 1; rows that are dense: all."""
        columns, recent = self.columns, self.recent
        seen = columns <= recent
        forced = forced & seen
        free = (columns >= 1) & (columns < recent) & ~forced
        ranked = scores.masked_fill(~free, -torch.inf)
        order = ranked.argsort(dim=3, descending=True, stable=True)
        room = (self.count - forced.sum(-1, keepdim=True)).clamp(min=0)
        first = (columns < room).expand_as(ranked)
        filled = torch.zeros_like(first).scatter(3, order, first) & free
        return torch.where(dense, seen, filled | forced)


def _topk(q: Tensor, k: Tensor, grid: _Grid, vertical: float) -> Tensor:
    rows, keys = grid.means(q, k)
    best = (rows @ keys.mT).topk(grid.count, 3).indices
    return torch.zeros(*q.shape[:2], grid.nq, grid.nk, dtype=torch.bool, device=q.device).scatter(
        3, best, True
    )


def _a(q: Tensor, k: Tensor, grid: _Grid, vertical: float) -> Tensor:
    rows, keys = grid.means(q, k)
    ends = (grid.columns == 0) | (grid.columns == grid.recent)
    return grid.best(rows @ keys.mT, ends, grid.recent + 1 <= grid.count)


def _vertical_slash(q: Tensor, k: Tensor, grid: _Grid, vertical: float) -> Tensor:
    length = k.shape[2]
    budget = min(length, grid.count * grid.block_k)
    columns = int(budget * vertical)
    rows = grid.block_q
    # Behind rows - 1 keys that are not there, a row that is read from one place further on has
    # equal distances in a column.
    scores = (q[:, :, -rows:] @ pad(k, (0, 0, rows - 1, 0)).mT).mul_(q.shape[3] ** -0.5)
    scores[..., : rows - 1] = -torch.inf
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -rows:].masked_fill_(future, -torch.inf)
    weights = scores.softmax(3)
    best = weights[..., rows - 1 :].sum(2).topk(columns, 2)
    ahead = sums_by(best.values, best.indices // grid.block_k, grid.nk + 1)[:, :, None]
    shape, strides = (*q.shape[:2], rows, length), weights.stride()
    strides = (*strides[:2], strides[2] + 1, 1)
    diagonals = weights.as_strided(shape, strides).sum(2).flip(2)
    best = diagonals.topk(budget - columns, 2)
    # A distance votes for the blocks from that of the row's first token to that of its last:
    # up by its weight where they begin, down behind their end, and then a running sum.
    first = (
        torch.arange(grid.nq, device=q.device)[:, None] * grid.block_q - best.indices[:, :, None]
    )
    last = first + grid.block_q - 1
    value = torch.where(last < 0, 0.0, best.values[:, :, None]).double()
    begin, end = first.clamp(min=0) // grid.block_k, last.clamp(min=0) // grid.block_k + 1
    steps = sums_by(torch.cat([value, -value], 3), torch.cat([begin, end], 3), grid.nk + 1)
    steps = steps.cumsum(3)
    scores = (torch.where(steps < 1e-12, 0.0, steps) + ahead)[..., : grid.nk]
    ends = (grid.columns == 0) | (grid.columns == grid.recent)
    return grid.best(scores, ends, grid.dense(budget))


def _vertical_slash_block(q: Tensor, k: Tensor, grid: _Grid, vertical: float) -> Tensor:
    rows, keys = grid.means(q, k)
    scores = (rows[:, :, -1:] @ keys.mT)[:, :, 0] * q.shape[3] ** -0.5
    columns = int(grid.count * vertical)
    best = scores.topk(columns, 2)
    ahead = torch.zeros_like(scores).scatter_add(2, best.indices, best.values)[:, :, None]
    best = scores.flip(2).topk(grid.count - columns, 2)  # distance from the last block
    back = torch.zeros_like(scores).scatter_add(2, best.indices, best.values)
    row = torch.arange(grid.nq, device=q.device)[:, None]
    first = (row * grid.block_q) // grid.block_k
    # A row's band, d blocks back, votes for block j if first - d <= j <= recent - d.
    sums = pad(back.double().cumsum(2), (1, 0))
    ends = [(x - grid.columns).clamp(0, grid.nk) for x in (first, grid.recent + 1)]
    votes = (sums[:, :, ends[1]] - sums[:, :, ends[0]]).to(ahead.dtype)
    own = (grid.columns >= first) & (grid.columns <= grid.recent)
    forced = own | (grid.columns == 0)
    return grid.best(votes + ahead, forced, grid.dense(grid.count * grid.block_k))


_MAKE = {
    "topk": _topk,
    "a": _a,
    "vertical_slash": _vertical_slash,
    "vertical_slash_block": _vertical_slash_block,
}
