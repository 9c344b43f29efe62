"""Attention of regions of queries to the regions that a route names, as a pair of torch operators.

Regions are taken as many at a time as fit into 2 MB of gathered keys and values, so that the
k-fold copy of all keys never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from regard.core.accumulate import add_rows
from regard.core.attention_pair import attention_pair
from regard.ops.block_sparse.tile import attend, gradients

# Numbers gathered at a time, and scores held at a time: 2 MB each in float32.
GATHERED = 1 << 19

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor route, Tensor? hidden"


class Routes:
    """The regions of keys of every region of queries, all heads and images one after the other.

    q [B, H, R, m, D], k [B, Hk, Rk, w, D], v [B, Hk, Rk, w, Dv], route [B, H | 1, R, n] with -1
    for none, hidden [B, Rk, w] or None.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, route: Tensor, hidden: Tensor | None):
        (B, H, R, m, D), (_, Hk, Rk, w, _), n = q.shape, k.shape, route.shape[3]
        inside = (route >= -1).all() & (route < max(Rk, 1)).all()
        if not bool(inside):
            low, high = int(route.min()), int(route.max())
            raise ValueError(
                f"routed_attention: route must be in [-1, {Rk}), got values from {low} to {high}"
            )
        route = route.long()
        spare = route < 0
        twice = (route[..., :, None] == route[..., None, :]).tril(-1).any(-1)  # counts once
        spare = spare | twice
        heads = torch.arange(H, device=q.device) // max(H // Hk, 1)
        image = torch.arange(B, device=q.device) * Hk
        base = (image[:, None] + heads) * Rk
        self.index = (route.clamp(min=0) + base[..., None, None]).expand(B, H, R, n).reshape(-1, n)
        self.spare = spare.expand(B, H, R, n).reshape(-1, n) if bool(spare.any()) else None
        self.hidden = None
        if hidden is not None:
            self.hidden = hidden[:, None].expand(B, Hk, Rk, w).reshape(-1, w)
        self.width = n * w
        per_tile = self.width * max(D + v.shape[4], 2 * m)
        self.together = max(1, GATHERED // max(per_tile, 1))

    def tiles(self) -> Iterator[slice]:
        """Regions of queries, a few at a time."""
        for first in range(0, len(self.index), self.together):
            yield slice(first, min(first + self.together, len(self.index)))

    def gathered(self, x: Tensor, tiles: slice) -> Tensor:
        """[tiles, n * w, X] of x [regions, w, X]."""
        index = self.index[tiles]
        return x.index_select(0, index.flatten()).view(len(index), self.width, x.shape[2])

    def unseen(self, tiles: slice) -> Tensor | None:
        """[tiles, 1, n * w], or None if all is seen."""
        found = None
        if self.hidden is not None:
            index = self.index[tiles]
            found = self.hidden.index_select(0, index.flatten()).view(len(index), 1, self.width)
        if self.spare is not None:
            spare = self.spare[tiles]
            each = self.width // spare.shape[1]
            spare = spare.repeat_interleave(each, 1)[:, None]
            found = spare if found is None else found | spare
        return found

    def spread(self, rows: Tensor, into: Tensor, tiles: slice) -> None:
        """Adds rows [tiles, n * w, X] to the regions that they were gathered from."""
        add_rows(into, self.index[tiles].flatten(), rows.view(-1, *into.shape[1:]))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    routes = Routes(q, k, v, route, hidden)
    out, lse = q.new_zeros(*q.shape[:4], v.shape[4]), q.new_full(q.shape[:4], -torch.inf)
    if not routes.width or not q.shape[3]:
        return out, lse
    queries, keys, values = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
    rows, sums = out.view(-1, *out.shape[3:]), lse.view(-1, *lse.shape[3:])
    for tiles in routes.tiles():
        rows[tiles], top = attend(
            queries[tiles], routes.gathered(keys, tiles), routes.gathered(values, tiles),
            routes.unseen(tiles),
        )  # fmt: skip
        sums[tiles] = top.squeeze(2)
    return out, lse


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    route: Tensor, hidden: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    routes = Routes(q, k, v, route, hidden)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not routes.width or not q.shape[3]:
        return dq, dk, dv
    d_rows, rows, sums, queries, keys, values, dqs, dks, dvs = (
        x.flatten(0, 2) for x in (d_out, out, lse, q, k, v, dq, dk, dv)
    )
    for tiles in routes.tiles():
        dqs[tiles], d_keys, d_values = gradients(
            d_rows[tiles], queries[tiles], routes.gathered(keys, tiles),
            routes.gathered(values, tiles), routes.unseen(tiles), rows[tiles],
            sums[tiles, :, None],
        )  # fmt: skip
        routes.spread(d_keys, dks, tiles)
        routes.spread(d_values, dvs, tiles)
    return dq, dk, dv


routed = attention_pair("routed", _ARGUMENTS, _forward, _backward)
