"""Attention of blocks of queries to lists of rows, and its gradient, in plain torch operations.

Lists of one head are taken several at a time, as many as fit into `GATHERED` numbers: their rows
are gathered side by side (shorter lists filled up with rows of weight 0), and scores, weights and
outputs are batched products. The backward computes the weights again from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regard.core.accumulate import add_rows
from regard.ops.block_sparse.lists import Lists, Reach
from regard.ops.block_sparse.pyramid import Layout

# Numbers gathered at a time, and scores held at a time: 8 MB each in float32.
GATHERED = 1 << 21


class Piece(NamedTuple):
    """Some lists of one head of the plan: `rows` [n, C], and which of them are filling."""

    first: int
    last: int
    rows: Tensor
    filling: Tensor | None
    hidden: Tensor | None  # [n, block_q, C'] of columns [low, high)
    low: int
    high: int


class Heads(NamedTuple):
    """The query heads h0..h1 of batch row b that share a list, and their key head."""

    b: int
    h0: int
    h1: int
    kv: int
    plan: int


def heads_of(q: Tensor, k: Tensor, plan: tuple[int, int]) -> Iterator[Heads]:
    """All of them; `plan` is the batch size and the heads of the plan."""
    (B, H), Hk, (Bp, Hp) = q.shape[:2], k.shape[1], plan
    group = H // max(Hk, 1)
    for b in range(B):
        row = b // (B // Bp) * Hp if Bp else 0  # under vmap rows of one plan are neighbours
        for kv in range(Hk):
            if Hp == H and group > 1:
                for h in range(kv * group, (kv + 1) * group):
                    yield Heads(b, h, h + 1, kv, row + h)
            else:
                yield Heads(b, kv * group, (kv + 1) * group, kv, row + (kv if Hp > 1 else 0))


class Pieces(Protocol):
    """What attention walks over: blocks of `block_q` queries, nq of them, with their rows."""

    block_q: int
    nq: int

    def pieces(self, plan: int, group: int, width: int) -> Iterator[Piece]:
        """Those of one head of the plan, for `group` query heads and D + Dv = `width`."""
        ...


class Walk:
    """The lists of a call, cut into pieces.

    `room`, if it is not 0, is the number of rows that every list gets, which then has at most as
    many: where plans are chosen by the data, how a later list turned out must not change the
    shape of a product, and with it the rounding, of an earlier one.
    """

    def __init__(
        self, lists: Lists, block_q: int, layout: Layout, reach: Reach, nq: int, room: int = 0
    ) -> None:
        self.lists, self.block_q, self.reach, self.nq = lists, block_q, reach, nq
        device = lists.offsets.device
        # Where rows are tokens, there is nothing to look up.
        self.tokens = layout.tokens(device) if len(layout.levels) > 1 else None
        self.offsets = lists.offsets.tolist()
        ends = torch.zeros(len(lists.length) + 1, dtype=torch.long, device=device)
        ends[1:] = lists.length.cumsum(0)
        self.ends = ends
        self.sizes = (ends[lists.offsets[1:]] - ends[lists.offsets[:-1]]).tolist()
        self.rooms = [room] * len(self.sizes) if room else self.sizes
        self.offset = torch.arange(nq * block_q, device=device) + reach.offset

    def pieces(self, plan: int, group: int, width: int) -> Iterator[Piece]:
        """Those of one head of the plan, for `group` query heads and D + Dv = `width`."""
        per_row = max(width, 2 * group * self.block_q)
        base, first = plan * self.nq, 0
        while first < self.nq:
            last, most = first + 1, self.rooms[base + first]
            while last < self.nq:
                wider = max(most, self.rooms[base + last])
                if (last + 1 - first) * wider * per_row > GATHERED:
                    break
                last, most = last + 1, wider
            if most:
                yield self._piece(base, first, last, most)
            else:
                yield Piece(first, last, self.offset.new_zeros(0, 0), None, None, 0, 0)
            first = last

    def _piece(self, base: int, first: int, last: int, most: int) -> Piece:
        s0, s1 = self.offsets[base + first], self.offsets[base + last]
        length, start = self.lists.length[s0:s1], self.lists.start[s0:s1]
        at = self.ends[s0:s1] - self.ends[s0]
        total = sum(self.sizes[base + first : base + last])
        flat = torch.repeat_interleave(start - at, length, output_size=total)
        flat += torch.arange(total, device=flat.device)
        clear = self.lists.clear[s0:s1]
        all_clear = bool(clear.all())
        seen = None if all_clear else torch.repeat_interleave(clear, length, output_size=total)
        sizes = self.sizes[base + first : base + last]
        filling = None
        if min(sizes) == most:
            rows = flat.view(last - first, most)
            seen = None if seen is None else seen.view(last - first, most)
        else:
            held = torch.tensor(sizes, device=flat.device)
            there = torch.arange(most, device=flat.device) < held[:, None]
            rows = flat.new_zeros(last - first, most)
            rows[there] = flat
            filling = ~there
            if seen is not None:
                spread = torch.ones_like(there)
                spread[there] = seen
                seen = spread
        return Piece(first, last, rows, filling, *self._hidden(rows, seen, first, last))

    def _hidden(
        self, rows: Tensor, seen: Tensor | None, first: int, last: int
    ) -> tuple[Tensor | None, int, int]:
        if seen is None:
            return None, 0, 0
        columns = (~seen).any(0).nonzero()
        low, high = int(columns[0]), int(columns[-1]) + 1
        rows = rows[:, None, low:high]
        begin, final = (rows, rows) if self.tokens is None else (x[rows] for x in self.tokens)
        position = self.offset[first * self.block_q : last * self.block_q]
        position = position.view(last - first, self.block_q, 1)
        hidden = torch.zeros((), dtype=torch.bool, device=rows.device)
        if self.reach.right >= 0:
            hidden = final > position + self.reach.right
        if self.reach.left >= 0:
            hidden = hidden | (begin < position - self.reach.left)
        return hidden, low, high


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, piece: Piece, group: int) -> Tensor:
    """[n, group * block_q, C]; -inf is hidden."""
    scores = torch.bmm(q, k.mT) if bias is None else torch.baddbmm(bias[:, None], q, k.mT)
    if piece.filling is not None:
        scores.masked_fill_(piece.filling[:, None], -torch.inf)
    if piece.hidden is not None:
        part = scores.unflatten(1, (group, -1))[..., piece.low : piece.high]
        part.masked_fill_(piece.hidden[:, None], -torch.inf)
    return scores


def _blocks(x: Tensor, block_q: int, nq: int, filling: float = 0.0) -> Tensor:
    """x [g, T, X] as [nq, g, block_q, X], filled up."""
    missing = nq * block_q - x.shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing), value=filling)
    return x.unflatten(1, (nq, block_q)).transpose(0, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, walk: Pieces, plan: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, Dv] and log-sum-exp [B, H, T] of q (scaled) against rows k, v, bias."""
    (B, H, T, D), Dv, block_q, nq = q.shape, v.shape[3], walk.block_q, walk.nq
    out, lse = q.new_zeros(B, H, T, Dv), q.new_full((B, H, T), -torch.inf)
    for heads in heads_of(q, k, plan):
        b, h0, h1, kv, row = heads
        queries, group = _blocks(q[b, h0:h1], block_q, nq), h1 - h0
        keys, values = k[b, kv], v[b, kv]
        added = None if bias is None else bias[b, kv if bias.shape[1] > 1 else 0]
        for piece in walk.pieces(row, group, D + Dv):
            if not piece.rows.numel():
                continue
            n, C = piece.rows.shape
            flat = piece.rows.reshape(-1)
            block = queries[piece.first : piece.last].reshape(n, group * block_q, D)
            scores = _scores(
                block, keys.index_select(0, flat).view(n, C, D),
                None if added is None else added.index_select(0, flat).view(n, C), piece, group,
            )  # fmt: skip
            top = scores.amax(2, keepdim=True)
            top = top.masked_fill_(top == -torch.inf, 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(2, keepdim=True)
            empty = total == 0
            rows = torch.bmm(weights, values.index_select(0, flat).view(n, C, Dv))
            rows /= total.masked_fill(empty, 1.0)
            top += total.log()
            t0, t1 = piece.first * block_q, min(piece.last * block_q, T)
            for target, part in ((out[b, h0:h1], rows), (lse[b, h0:h1, :, None], top)):
                part = part.view(n, group, block_q, -1).transpose(0, 1).flatten(1, 2)
                target[:, t0:t1] = part[:, : t1 - t0]
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    out: Tensor, lse: Tensor, walk: Pieces, plan: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias (no elements where there is none)."""
    (T, D), Dv, block_q, nq = q.shape[2:], v.shape[3], walk.block_q, walk.nq
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_bias = q.new_zeros(0) if bias is None else torch.zeros_like(bias)
    # A row that no loss looks at has no effect, even where it has overflowed.
    idle = (d_out == 0).all(3, keepdim=True)
    some_idle = bool(idle.any())
    delta = torch.where(idle, 0.0, d_out * out).sum(3, keepdim=True)
    seen = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    for heads in heads_of(q, k, plan):
        b, h0, h1, kv, row = heads
        group, at = h1 - h0, kv if bias is not None and bias.shape[1] > 1 else 0
        parts = [_blocks(x[b, h0:h1], block_q, nq) for x in (q, d_out, delta)]
        parts.append(_blocks(seen[b, h0:h1], block_q, nq, torch.inf))
        resting = _blocks(idle[b, h0:h1], block_q, nq) if some_idle else None
        added = None if bias is None else bias[b, at]
        for piece in walk.pieces(row, group, D + Dv):
            if not piece.rows.numel():
                continue
            n, C = piece.rows.shape
            flat = piece.rows.reshape(-1)
            block, d_rows, less, shift = (
                x[piece.first : piece.last].reshape(n, group * block_q, x.shape[3]) for x in parts
            )
            keys = k[b, kv].index_select(0, flat).view(n, C, D)
            weights = _scores(
                block, keys, None if added is None else added.index_select(0, flat).view(n, C),
                piece, group,
            ).sub_(shift).exp_()  # fmt: skip
            if resting is not None:
                still = resting[piece.first : piece.last].reshape(n, group * block_q, 1)
                weights.masked_fill_(still, 0.0)
            add_rows(dv[b, kv], flat, torch.bmm(weights.mT, d_rows).view(-1, Dv))
            values = v[b, kv].index_select(0, flat).view(n, C, Dv)
            slopes = torch.bmm(d_rows, values.mT).sub_(less).mul_(weights)
            if bias is not None:
                add_rows(d_bias[b, at], flat, slopes.sum(1).view(-1))
            add_rows(dk[b, kv], flat, torch.bmm(slopes.mT, block).view(-1, D))
            t0, t1 = piece.first * block_q, min(piece.last * block_q, T)
            rows = torch.bmm(slopes, keys).view(n, group, block_q, D).transpose(0, 1).flatten(1, 2)
            dq[b, h0:h1, t0:t1] = rows[:, : t1 - t0]
    return dq, dk, dv, d_bias
