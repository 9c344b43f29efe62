"""Lightning Attention-1: the left product (Q K^T * M) V, tile by tile.

    o_t = sum_{j <= t} w_tj (q_t . k_j) v_j,      w_tj: the product of the decays from j to t

A tile of scores is formed, used and forgotten: O(T) memory, but O(T^2) time, as every query
meets every key before it. It sums in another order than the recurrence, without a state, which
is what makes it a check of the forms that are fast.

It has a loop of its own because the engine's, between whose chunks there is a state, cannot be
run without one. Registered as `regard::lightning_left_fwd` and `regard::lightning_left_bwd`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from regard.core.dispatch import Form
from regard.core.precision import without_autocast
from regard.ops.linear.chunks import decay_shape
from regard.ops.linear.decays import split_steps
from regard.ops.linear.engine import Rule, by_rule, encode, read
from regard.ops.linear.problem import Problem
from regard.ops.linear.registered import register

TILE = 128


def left_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t and the last state, as `ops.linear.chunked`, without the states between.

    q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, E], log_decay [B, Hk, T] or None, state
    [B, Hk, D, E]. O(T^2 (D + E)) time, O(T (D + E)) memory, forward and backward. Raises on
    double backward.
    """
    return _forward(q, k, v, log_decay, state, tile or TILE)


class _Tiles:
    """A call as N = B Hk sequences with G query rows per key, and the decays between its tokens."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, tile: int
    ) -> None:
        self.N, self.T, self.G = k.shape[0] * k.shape[1], k.shape[2], q.shape[1] // k.shape[1]
        self.tile, self.dtype = tile, k.dtype
        self.q, self.k, self.v = self.queries(q), k.flatten(0, 1), v.flatten(0, 1)
        if log_decay is None:
            log_decay = k.new_zeros(()).expand(self.N, self.T)
        steps, forgets = split_steps(log_decay.reshape(self.N, self.T))
        # A zero in front: token -1 is the state before the call.
        self.sums = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
        self.cuts = torch.nn.functional.pad(forgets.cumsum(1), (1, 0))

    def queries(self, x: Tensor) -> Tensor:
        return x.reshape(self.N, self.G, self.T, x.shape[3])

    def pairs(self) -> Iterator[tuple[int, int, int, int]]:
        """Queries [i, j) and keys [a, b) of every tile that has something in it."""
        for i in range(0, self.T, self.tile):
            for a in range(0, i + 1, self.tile):
                yield i, min(i + self.tile, self.T), a, min(a + self.tile, self.T)

    def between(self, i: int, j: int, a: int, b: int) -> tuple[Tensor, Tensor]:
        """From keys [a, b) to queries [i, j): decays [N, 1, m, n], and what is not seen."""
        later, earlier = self.sums[:, i + 1 : j + 1, None], self.sums[:, None, a + 1 : b + 1]
        unseen = self.cuts[:, i + 1 : j + 1, None] != self.cuts[:, None, a + 1 : b + 1]
        if a == i:
            unseen = unseen | torch.ones_like(unseen).triu(1)
        weights = (later - earlier).to(self.dtype).masked_fill(unseen, -torch.inf).exp()
        return weights[:, None], unseen[:, None]

    def product(self, rows: Tensor, columns: Tensor, unseen: Tensor) -> Tensor:
        """rows [N, G, m, c] times columns [N, n, c]: exact 0 where nothing is seen."""
        return (rows @ columns.mT[:, None]).masked_fill_(unseen, 0.0)

    def decays(self, t: slice, last: bool) -> tuple[Tensor, Tensor]:
        """From before the call to tokens t, or with `last` from them to the end; and unseen."""
        sums, cuts = self.sums[:, 1:], self.cuts[:, 1:]
        if not last:
            return sums[:, t].to(self.dtype).exp()[..., None], (cuts[:, t] > 0)[..., None]
        leaving = (self.sums[:, -1:] - sums[:, t]).to(self.dtype).exp()
        return leaving[..., None], (cuts[:, t] != self.cuts[:, -1:])[..., None]

    def whole(self, state: Tensor) -> Tensor:
        """A state [N, D, E] times the decay over the call."""
        factor = self.sums[:, -1:, None].to(self.dtype).exp()
        return (state * factor).masked_fill_(self.cuts[:, -1:, None] > 0, 0.0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        tiles = _Tiles(q, k, v, log_decay, tile)
        past = state.flatten(0, 1)
        entering, unseen = tiles.decays(slice(None), last=False)
        out = (tiles.q @ past[:, None]) * entering[:, None]
        out = out.masked_fill_(unseen[:, None], 0.0)
        for i, j, a, b in tiles.pairs():
            weights, unseen = tiles.between(i, j, a, b)
            scores = tiles.product(tiles.q[:, :, i:j], tiles.k[:, a:b], unseen) * weights
            out[:, :, i:j] += scores @ tiles.v[:, None, a:b]
        leaving, unseen = tiles.decays(slice(None), last=True)
        keys = (tiles.k * leaving).masked_fill_(unseen, 0.0)
        after = torch.baddbmm(tiles.whole(past), keys.mT, tiles.v)
        return out.view(*q.shape[:3], v.shape[3]), after.view(state.shape)


def _differentiate(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    tile: int,
    wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        tiles = _Tiles(q, k, v, log_decay, tile)
        past, future = state.flatten(0, 1), d_state.flatten(0, 1)
        gradient = tiles.queries(d_out)
        entering, unseen = tiles.decays(slice(None), last=False)
        scaled = (gradient * entering[:, None]).masked_fill_(unseen[:, None], 0.0)
        dq = scaled @ past.mT[:, None]
        d_past = tiles.whole(future) + (tiles.q.mT @ scaled).sum(1)
        crossing = (tiles.whole(past) * future).sum((1, 2))[:, None]
        steps = crossing + _from_here_on((tiles.q * dq).sum((1, 3)))
        leaving, unseen = tiles.decays(slice(None), last=True)
        dk = (tiles.v @ future.mT * leaving).masked_fill_(unseen, 0.0)
        dv = (tiles.k * leaving).masked_fill_(unseen, 0.0) @ future
        steps = steps + _before((tiles.k * dk).sum(2))
        for i, j, a, b in tiles.pairs():
            weights, unseen = tiles.between(i, j, a, b)
            queries, keys, values = tiles.q[:, :, i:j], tiles.k[:, a:b], tiles.v[:, a:b]
            scores = tiles.product(queries, keys, unseen) * weights
            products = tiles.product(gradient[:, :, i:j], values, unseen)
            if wants_decay and log_decay is not None:
                _add_steps(steps, (scores * products).sum(1), i, j, a, b)
            products = products * weights
            dq[:, :, i:j] += products @ keys[:, None]
            dk[:, a:b] += (products.mT @ queries).sum(1)
            dv[:, a:b] += (scores.mT @ gradient[:, :, i:j]).sum(1)
        d_decay = q.new_empty(decay_shape(log_decay, wants_decay))
        if d_decay.numel():
            d_decay.copy_(steps.view(d_decay.shape))
        found = dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), d_decay
        return *found, d_past.view(state.shape)


def _add_steps(steps: Tensor, shares: Tensor, i: int, j: int, a: int, b: int) -> None:
    """Step l decays what goes from a key before it to a query at it or after: shares [N, m, n]."""
    if a == i:
        inside = shares.cumsum(2)[:, 1:, :-1].tril().sum(1)
        steps[:, i + 1 : j] += inside
        return
    steps[:, i:j] += _from_here_on(shares.sum(2))
    steps[:, a:b] += _before(shares.sum(1))
    steps[:, b:i] += shares.sum((1, 2))[:, None]


def _from_here_on(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1).flip(1)


def _before(x: Tensor) -> Tensor:
    sums = torch.zeros_like(x)
    sums[:, 1:] = x[:, :-1].cumsum(1)
    return sums


_forward = register("lightning_left", (), _attend, _differentiate)


def _rule(problem: Problem) -> Rule:
    return Rule(encode, read, partial(left_product, tile=problem.chunk))


def _refuse(problem: Problem) -> str | None:
    if not problem.causal:
        return "not causal: every query reads one state"
    return "its decays are one per token" if problem.per_channel else None


FORM = Form("eager", "left_product", _refuse, by_rule(_rule))
