"""The systems (C + lambda I) x = b of a block of queries, and the two ways to solve them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.local_linear.cg import conjugate_gradient
from regard.ops.local_linear.covariance import FEW_ROWS, factor
from regard.ops.local_linear.layout import Block
from regard.ops.local_linear.tiles import Heads

# The largest ridge, by head size, at which "auto" takes the direct method: conjugate gradients
# need fewer iterations the larger the ridge, and each costs less than the covariance from
# D = 64 on. Iterations also grow with the digits asked for.
_DIRECT_UP_TO = {
    torch.float64: ((16, float("inf")), (32, 10.0), (64, 1.0), (128, 0.1)),
    torch.float32: ((16, 3.0), (32, 0.1), (64, 0.003), (128, 0.001)),
}
_HALF = ((8, 3.0), (16, 1.0), (32, 0.03))
# An absolute ridge is divided by the sum of exp(score), which may be any number: as if by this.
EVIDENCE = 1000.0
# A first solution whose relative residual exceeds this is not worth refining.
_ROUGH = 1e-2
# Weights p (1 - g . (k - kbar)) may carry this much rounding, as |g| times that of the keys.
_NOISE = 1e-3


# Few queries at once (decoding): a covariance is one pass over the keys, and an iteration two;
# up to this size, S x D, the calls themselves cost more than either.
_SHORT_CACHE = 1 << 17


def prefers_direct(
    dtype: torch.dtype, sizes: tuple[int, int, int], ridge: float, absolute: bool
) -> bool:
    """What solver="auto" does, from metadata and the number that a ridge is, if it is one.

    `sizes` are the rows that share a key head (queries x group), keys, and the head size.
    """
    rows, S, D = sizes
    if absolute:
        ridge = ridge / EVIDENCE
    table = _DIRECT_UP_TO.get(dtype, _HALF)
    small = any(size >= D and ridge <= largest for size, largest in table)
    if rows <= FEW_ROWS:
        return (2 * _SHORT_CACHE if small else _SHORT_CACHE) >= S * D
    return small


@dataclass(frozen=True)
class Solver:
    """How to solve: by a Cholesky factor, or by conjugate gradients to a relative residual."""

    direct: bool
    tol: float
    max_iters: int
    precise: bool = False  # also as to the rounding of means: see `wants_precision`

    def rescues(self, dtype: torch.dtype) -> bool:
        """Whether rows that fail are solved again, directly in float64.

        Not where tol = 0 forbids to ask, nor where that is what was done.
        """
        return self.tol > 0 and not (self.direct and dtype == torch.float64)


def wants_precision(direct: bool, tol: float) -> bool:
    """Whether more digits are asked for than a mean key in float32 leaves where g is large.

    The keys of a causal call are centred on the first one, and lie as far from it as from each
    other. g . kbar then carries 1e-5 of rounding, twice: in the covariance and in the weights.
    Both can be taken off again, as both are known to be 0 otherwise; it costs one more product
    with the keys, and a sum in every iteration.
    """
    return direct or tol <= 1e-6


class Solution(NamedTuple):
    """Rows [n, M, .]; `failed` says which are not what was asked for."""

    x: Tensor
    iterations: Tensor
    residual: Tensor
    failed: Tensor

    def final(self) -> Solution:
        """Where nobody will solve again: x = 0, the local average, in the rows that failed."""
        x = self.x.masked_fill(self.failed, 0.0)
        return self._replace(x=x, residual=self.residual.masked_fill(self.failed, 1.0))


@dataclass(frozen=True)
class System:
    """C + lambda I for every row of a block: covariances of the keys under the rows' weights."""

    heads: Heads
    block: Block
    weights: Tensor  # [n, M, J]
    inverse: Tensor | None  # what normalises them [n, M, 1]; None: they sum to 1
    mean: Tensor  # of the centred keys, [n, M, D]
    ridge: Tensor  # effective, relative, [n, M, 1]
    precise: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """(C + lambda I) x."""
        y = self.heads.covariance(self.block, self.weights, self.mean, x, self.precise)
        return torch.addcmul(y if self.inverse is None else y * self.inverse, self.ridge, x)

    def solve(
        self, solver: Solver, rights: Sequence[Tensor], starts: Sequence[Tensor | None]
    ) -> list[Solution]:
        """A solution for each right-hand side [n, M, D]; `starts` are first guesses for CG.

        The first is the probe g; what becomes of a row whose g is lost in rounding does not
        matter for the others.
        """
        if solver.direct:
            found = self.direct(rights)
        else:
            found = [self._iterate(solver, *pair) for pair in zip(rights, starts, strict=True)]
        g = found[0]
        size = self.mean.norm(dim=-1, keepdim=True) + rights[0].norm(dim=-1, keepdim=True)
        noise = torch.finfo(g.x.dtype).eps * g.x.norm(dim=-1, keepdim=True) * size
        found[0] = g._replace(failed=g.failed | ~(noise < _NOISE))
        return found

    def _iterate(self, solver: Solver, right: Tensor, start: Tensor | None) -> Solution:
        x, steps, residual = conjugate_gradient(
            self.apply, right, solver.tol, solver.max_iters, start
        )
        # The residual is the root of what was compared: a last digit must not decide.
        return Solution(x, steps, residual, residual > solver.tol * (1 + 1e-5))

    def direct(self, rights: Sequence[Tensor]) -> list[Solution]:
        """By a Cholesky factor, refined once; x = 0 where that came to nothing."""
        factors = factor(self.heads, self.block, self.weights, self.inverse, self.mean, self.ridge)
        found = []
        for right in rights:
            x = factors.solve(right)
            rest = right - self.apply(x)
            # One step of refinement, by the product that takes the mean off first: it gives
            # back the digits that C = sum p k k^T - kbar kbar^T has lost.
            better = x + factors.solve(rest)
            size, left = (y.norm(dim=-1, keepdim=True) for y in (right, rest))
            nothing = size == 0
            residual = torch.where(nothing, 0.0, left / size)
            good = factors.sound & better.isfinite().all(-1, keepdim=True) & (residual < _ROUGH)
            found.append(
                Solution(
                    torch.where(good & ~nothing, better, 0.0),
                    torch.zeros_like(residual, dtype=torch.int32),
                    torch.where(good | nothing, residual, 1.0),
                    ~(good | nothing),
                )
            )
        return found
