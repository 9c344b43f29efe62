"""Attention over the ends of finished chunks and the running key, in eager torch.

By blocks of queries, so that no tensor of T x T / L elements exists; the backward computes the
weights again, from the log of their sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.core.accumulate import add_rows

SCORES = 1 << 19  # of one block
MOST_ON_GPU = 1 << 23
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Inputs:
    """One call of the registered op: averaged keys and values on places, and who sees what.

    `place` [1 | B, T] (int32) is where a query stands, -1 before everything; None: query i stands
    at place i + offset, which else is the largest it may be. Slots of `past` are turned, those
    from `past_count` [1 | B] on are not in use. `cosine`, `sine` [1 | B, chunks, D / 2].
    """

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, Hk, places, D], as v
    v: Tensor
    past_k: Tensor  # [B, Hk, past, D]
    past_v: Tensor
    past_count: Tensor | None
    place: Tensor | None
    cosine: Tensor | None
    sine: Tensor | None
    scale: float
    chunk: int
    offset: int

    @cached_property
    def finished(self) -> int:
        """Chunks of this call whose end a query may see."""
        return max(self.k.shape[2] - 1, 0) // self.chunk

    @cached_property
    def places(self) -> Tensor:
        """[B, T], -1 at least."""
        B, T = self.q.shape[0], self.q.shape[2]
        if self.place is None:
            at = torch.arange(T, device=self.q.device) + self.offset
            return at.clamp(min=-1).expand(B, T)
        return for_batch(self.place, B).long()

    @cached_property
    def chunks(self) -> Tensor:
        """Of every query [B, T]; of those before everything -1."""
        return torch.div(self.places, self.chunk, rounding_mode="floor")

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Keys (turned) and values [B, Hk, past + finished, D]."""
        last = slice(self.chunk - 1, None, self.chunk)
        k, v = (x[:, :, last][:, :, : self.finished] for x in (self.k, self.v))
        numbers = torch.arange(self.finished, device=k.device)
        k = self.turn(k, numbers.expand(k.shape[0], -1))
        return torch.cat([self.past_k, k], 2), torch.cat([self.past_v, v], 2)

    def turn(self, x: Tensor, chunks: Tensor, sign: int = 1) -> Tensor:
        """x [B, h, n, D] by the angles of chunks [B, n], or back."""
        if self.cosine is None or self.sine is None:
            return x
        at = chunks.clamp(min=0)[..., None].expand(-1, -1, self.cosine.shape[2])
        cosine, sine = (
            for_batch(table, x.shape[0]).gather(1, at)[:, None]
            for table in (self.cosine, self.sine)
        )
        return turned(x, cosine, sign * sine)

    def own(self, x: Tensor) -> Tensor:
        """x [B, Hk, places, D] at the places of the queries, for every query head."""
        H, T = self.q.shape[1:3]
        if self.place is None and self.offset >= 0:
            rows = x.narrow(2, self.offset, T)
            return rows if x.shape[1] == H else rows.repeat_interleave(H // x.shape[1], 1)
        return rows_at(x, self.places).repeat_interleave(H // x.shape[1], 1)

    def hide(self, x: Tensor, start: int, stop: int, value: float) -> None:
        """Overwrites what belongs to ends that queries do not see, in x [B, H, rows, columns]."""
        past, columns, first = self.past_k.shape[2], x.shape[3], 0
        if self.place is None and self.past_count is None:
            first = min(past + max(start + self.offset, 0) // self.chunk, columns)
        if first == columns:
            return
        number = torch.arange(first, columns, device=self.q.device)
        seen = number - past < self.chunks[:, start:stop, None]
        if self.past_count is not None:
            count = for_batch(self.past_count, len(seen))[:, None, None]
            seen = seen & ((number < count) | (number >= past))
        x[..., first:].masked_fill_(~seen[:, None], value)

    def blocks(self) -> list[tuple[int, int, int]]:
        """(start, stop, how many ends they see at most)."""
        B, H, T, _ = self.q.shape
        past, scores = self.past_k.shape[2], SCORES
        if self.q.device.type != "cpu":
            scores = max(scores, min(MOST_ON_GPU, T * (past + self.finished) // 2))
        rows = max(FEWEST_ROWS, scores // max(B * H * (past + self.finished), 1))
        found = []
        for start in range(0, T, rows):
            stop = min(start + rows, T)
            chunks = min(max((stop - 1 + self.offset) // self.chunk, 0), self.finished)
            found.append((start, stop, past + chunks))
        return found


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs of channels (c, c + D / 2) turned by the angles of the tables."""
    half = x.shape[-1] // 2
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, Hk, places, D] at the places [B, T], those below 0 taken for 0."""
    at = places.clamp(min=0)[:, None, :, None]
    return x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))


def for_batch(x: Tensor, batch: int) -> Tensor:
    """Rows that neighbours in the batch share, one for each."""
    return x if len(x) == batch else x.repeat_interleave(batch // max(len(x), 1), 0)


def forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D], and the logarithm of the sum of weights [B, H, T], inf where none is."""
    q = given.q * given.scale
    own = (q * given.own(given.k)).sum(-1, keepdim=True)
    blind = (given.places < 0)[:, None, :, None]
    values = given.own(given.v).masked_fill(blind, 0.0)
    q, (k, v) = given.turn(q, given.chunks), given.ends
    out, lse = torch.empty_like(values), q.new_empty(q.shape[:3])
    for start, stop, columns in given.blocks():
        part = slice(start, stop)
        scores = per_group(q[:, :, part], k[:, :, :columns].mT)
        given.hide(scores, start, stop, -torch.inf)
        top = own[:, :, part]
        if columns:
            top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, weight = scores.sub_(top).exp_(), (own[:, :, part] - top).exp()
        total = weights.sum(-1, keepdim=True) + weight
        found = per_group(weights, v[:, :, :columns]).addcmul_(weight, values[:, :, part])
        out[:, :, part] = (found / total).masked_fill_(blind[:, :, part], 0.0)
        lse[:, :, part] = (top + total.log()).squeeze(-1)
    return out, lse.masked_fill_(blind.squeeze(-1), torch.inf)


def backward(given: Inputs, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, past_k and past_v."""
    scale, past, blind = given.scale, given.past_k.shape[2], (given.places < 0)[:, None, :, None]
    delta, lse = (grad * out).sum(-1, keepdim=True), lse[..., None]
    own_k, own_v = given.own(given.k), given.own(given.v)
    own = (given.q * scale * own_k).sum(-1, keepdim=True).masked_fill(blind, 0.0)
    weight = (own - lse).clamp_(max=0.0).exp_()
    of_score = weight * ((grad * own_v).sum(-1, keepdim=True) - delta).masked_fill_(blind, 0.0)
    of_score = of_score * scale
    dq = of_score * own_k
    dk, dv = _put_back(given, of_score * given.q), _put_back(given, weight * grad)
    q, (k, v) = given.turn(given.q * scale, given.chunks), given.ends
    of_k, of_v, of_q = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(q)
    for start, stop, columns in given.blocks():
        part = slice(start, stop)
        rows = grad[:, :, part]
        weights = per_group(q[:, :, part], k[:, :, :columns].mT).sub_(lse[:, :, part])
        given.hide(weights, start, stop, -torch.inf)
        weights.clamp_(max=0.0).exp_()
        scores = per_group(rows, v[:, :, :columns].mT).sub_(delta[:, :, part]).mul_(weights)
        given.hide(scores, start, stop, 0.0)
        of_q[:, :, part] = per_group(scores, k[:, :, :columns])
        of_k[:, :, :columns] += per_keys(scores, q[:, :, part], k.shape[1])
        of_v[:, :, :columns] += per_keys(weights, rows, v.shape[1])
    dq = (dq + given.turn(of_q, given.chunks, -1) * scale).masked_fill_(blind, 0.0)
    numbers = torch.arange(given.finished, device=q.device).expand(q.shape[0], -1)
    last = slice(given.chunk - 1, None, given.chunk)
    dk[:, :, last][:, :, : given.finished] += given.turn(of_k[:, :, past:], numbers, -1)
    dv[:, :, last][:, :, : given.finished] += of_v[:, :, past:]
    return dq, dk, dv, of_k[:, :, :past].clone(), of_v[:, :, :past].clone()


def _put_back(given: Inputs, x: Tensor) -> Tensor:
    """The transpose of `own`."""
    B, H, T, D = x.shape
    Hk = given.k.shape[1]
    x = x.masked_fill((given.places < 0)[:, None, :, None], 0.0)
    x = x.view(B, Hk, H // Hk, T, D).sum(2)
    into = x.new_zeros(B, given.k.shape[2], Hk, D)
    places = given.places.clamp(min=0).expand(B, T)
    for row, at, rows in zip(into, places, x.transpose(1, 2), strict=True):
        add_rows(row, at, rows)
    return into.transpose(1, 2).contiguous()


def per_group(x: Tensor, y: Tensor) -> Tensor:
    """x [B, H, n, m] times y [B, Hk, m, c]: the query heads of a group share one product."""
    B, H, n, m = x.shape
    Hk, c = y.shape[1], y.shape[3]
    return (x.reshape(B, Hk, H // Hk * n, m) @ y).view(B, H, n, c)


def per_keys(x: Tensor, y: Tensor, Hk: int) -> Tensor:
    """x [B, H, n, m] transposed, times y [B, H, n, c], summed over the heads of a group."""
    B, H, n, m = x.shape
    rows = B, Hk, H // Hk * n
    return x.reshape(*rows, m).mT @ y.reshape(*rows, y.shape[3])
