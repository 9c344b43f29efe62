"""The probes of a block in the backward, and the gradients of its scores tile by tile.

h solves (C + lambda I) h = m and gives g (the same, unless covariances are block-diagonal);
u solves it with the gradient of h, and is what reaches queries and keys through the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.ops.local_linear.diagonal import joined, joined_backward
from regard.ops.local_linear.layout import Block
from regard.ops.local_linear.solve import Solver, System
from regard.ops.local_linear.tiles import Heads


@dataclass(frozen=True)
class Probe:
    """Rows [n, M, D]."""

    g: Tensor
    h: Tensor
    u: Tensor | None  # None where g is given and nothing is solved
    of_query: Tensor  # u less what reaches m = kbar - q beside the solve: the part of dq
    row: Tensor  # sum_j p_j G_j + lambda h . u, [n, M, 1]: 0 with one block
    failed: Tensor

    @staticmethod
    def solve(system: System, solver: Solver, m: Tensor, right: Tensor, start: Tensor) -> Probe:
        """`right` is minus the gradient of g, `start` what the forward had found."""
        nobody_solves_again = solver.direct and m.dtype == torch.float64
        zero = torch.zeros_like(m[..., :1])
        if system.heads.width == m.shape[2]:
            first, second = system.solve(solver, [m, right], [start, None])
            failed = first.failed | second.failed
            if nobody_solves_again:
                first, second = first.final(), second.final()
                second = second._replace(x=second.x.masked_fill(first.failed, 0.0))
            return Probe(first.x, first.x, second.x, second.x, zero, failed)
        width = system.heads.width
        (first,) = system.solve(solver, [m], [None])
        failed = first.failed
        first = first.final() if nobody_solves_again else first
        of_h, of_m = joined_backward(first.x, m, width, -right)
        (second,) = system.direct([-of_h])
        g, u = joined(first.x, m, width), second.x.masked_fill(first.failed, 0.0)
        row = (u * m).sum(-1, keepdim=True) - (g * right).sum(-1, keepdim=True)
        return Probe(g, first.x, u, u - of_m, row, failed | second.failed)

    @staticmethod
    def given(g: Tensor, right: Tensor) -> Probe:
        """Of a g that does not depend on the keys."""
        none = torch.zeros_like(g[..., :1])
        row = -(g * right).sum(-1, keepdim=True)
        return Probe(g, none, None, none, row, none.bool())

    def without(self, rows: Tensor) -> Probe:
        """0 in `rows` [n, M, 1]."""
        now = {name: getattr(self, name) for name in ("g", "h", "u", "of_query", "row")}
        return replace(self, **{name: x.masked_fill(rows, 0) for name, x in now.items()})

    @property
    def agreement(self) -> Tensor:
        """h . u, the gradient of the relative ridge."""
        if self.u is None:
            return self.h
        return (self.h * self.u).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Cotangents:
    """What the tiles of one block send back to scores, keys and values."""

    heads: Heads
    block: Block
    weights: Tensor  # p, [n, M, J]
    mean: Tensor
    gamma: Tensor  # e . v_j centred, [n, M, J], in scratch memory that is written over
    e: Tensor
    probe: Probe
    constant: Tensor  # added to every G of a row [n, M, 1]

    def scores(
        self, c0: int, c1: int, of_k: Tensor | None, of_v: Tensor | None, wanted: bool
    ) -> Tensor:
        """dS of a tile (if wanted); adds to of_v, and to of_k all that does not go through dS."""
        probe, heads = self.probe, self.heads
        at_zero = heads.offset(probe.g, self.mean)
        tile = heads.weighted(self.block, self.weights, -probe.g, at_zero, c0, c1)  # p (1 - a)
        if of_v is not None:
            heads.collect_columns(of_v, tile, self.e)
        if not wanted:
            return tile
        one = heads.width == probe.g.shape[2]
        return (self._whole if one else self._blocks)(tile, c0, c1, of_k)

    def _whole(self, tile: Tensor, c0: int, c1: int, of_k: Tensor | None) -> Tensor:
        """p ((1 - a)(gamma - b) + constant)."""
        heads, u, w = self.heads, self.probe.u, self.weights[:, :, c0:c1]
        rest = self.gamma[:, :, c0:c1]
        if u is not None:
            if of_k is not None:
                heads.collect_columns(of_k, tile, u, -1.0)
            rest = heads.plus(self.block, rest, -u, c0, c1)
            rest.add_((u * self.mean).sum(-1, keepdim=True))
            heads.blank(self.block, rest, c0, c1)
        tile.mul_(rest).addcmul_(w, self.constant)
        if of_k is not None:
            heads.collect_columns(of_k, rest.mul_(w), self.probe.g, -1.0)
        return tile

    def _blocks(self, tile: Tensor, c0: int, c1: int, of_k: Tensor | None) -> Tensor:
        """p ((1 - a) gamma + sum_b b_b h_b - u' . k + constant) with b_b, h_b of every block."""
        probe, w, gamma = self.probe, self.weights[:, :, c0:c1], self.gamma[:, :, c0:c1]
        assert probe.u is not None
        total = self._centred(probe.of_query, c0, c1, slice(None), "total").neg_()
        for at in self.heads.spans():
            b = self._centred(probe.u, c0, c1, at, "u")
            h = self._centred(probe.h, c0, c1, at, "h")
            total.addcmul_(b, h)
            if of_k is not None:
                of_k[..., at].baddbmm_(b.mul_(w).mT, probe.h[..., at])
                of_k[..., at].baddbmm_(h.mul_(w).mT, probe.u[..., at])
        tile.mul_(gamma).addcmul_(w, total.add_(self.constant))
        if of_k is not None:
            of_k.baddbmm_(w.mT, probe.of_query, alpha=-1)
            of_k.baddbmm_(gamma.mul_(w).mT, probe.g, alpha=-1)
        return tile

    def _centred(self, x: Tensor, c0: int, c1: int, at: slice, name: str) -> Tensor:
        """x . (k_j - kbar) over some channels, 0 where hidden."""
        x, mean = x[..., at], self.mean[..., at]
        keys = self.heads.keys(self.block, c0, c1)[..., at]
        out = self.heads.space.take(name, *x.shape[:2], c1 - c0)
        torch.bmm(x, keys.mT, out=out).sub_((x * mean).sum(-1, keepdim=True))
        self.heads.blank(self.block, out, c0, c1)
        return out
