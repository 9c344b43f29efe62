"""One problem of the engine: what every form of every mechanism with a fixed-size state is given.

A mechanism describes its call as a `Problem` and computes nothing itself; a form answers with a
`Solution`. Maps of queries and keys are part of the description, so that a kernel which knows
one forms it where it is needed; a form that knows none asks `featured` for prepared tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from regard.core.checks import Sizes
from regard.core.packed import Span, spans
from regard.core.precision import compute_dtype


def _same(x: Tensor) -> Tensor:
    return x


def _as_wide(width: int) -> int:
    return width


class Feature(NamedTuple):
    """A map of queries or keys: `apply` takes [B, h, n, D] to [B, h, n, F] in one dtype.

    name: the word by which a kernel knows it; keeps_zero: whether apply(0) = 0; width: F from D;
    weights: the tensors that `apply` is closed over, for kernels that apply it themselves.
    project: the linear part of `apply`, up to which `name` determines it; None where it is all x.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    keeps_zero: bool = False
    width: Callable[[int], int] = _as_wide
    weights: tuple[Tensor, ...] = ()
    project: Callable[[Tensor], Tensor] | None = None


IDENTITY = Feature("identity", _same, keeps_zero=True)


NUMBERS = frozenset({float, int, type(None)})  # types of a scale that is no tensor


class Problem(NamedTuple):
    """S <- exp(log_decay) S + phi(k) v^T, read by phi(q): one call, not computed yet.

    q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, E] as the caller gave them. With F the width
    of the features:

    scale: multiplies phi(q): a number, a tensor [] or [H]; None is 1.
    key_mask: bool [B, S]; a masked key writes nothing and advances no decay.
    log_decay: [B, 1 | Hk, S], or per channel [B, 1 | Hk, S, F]; None is 0.
    beta: [B, 1 | Hk, S]: the delta rule, u = beta (v - S^T k) in the place of v.
    normaliser: None for the numerator; "sum" divides by phi(q) . z, z the decayed sum of phi(k);
        a number divides by that or the number, whichever is larger.
    epsilon: added to the sum of weights before the division.
    S [B, Hk, F, E], z [B, Hk, F]: the state before the first key, z only with a normaliser.
    chunk: tokens per chunk, where a form has chunks.
    cu_seqlens, cu_seqlens_k: boundaries of packed sequences (B = 1); S and z then have one row
        per sequence.
    wants_state: whether `Solution.S` (and z) are asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = False
    query_map: Feature = IDENTITY
    key_map: Feature = IDENTITY
    scale: float | Tensor | None = None
    key_mask: Tensor | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    normaliser: Literal["sum"] | float | None = None
    S: Tensor | None = None
    z: Tensor | None = None
    chunk: int | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    wants_state: bool = False
    epsilon: float = 0.0

    @property
    def minimum(self) -> float | None:
        """What the sum of weights is clamped to, or None."""
        return None if self.normaliser in (None, "sum") else float(self.normaliser)

    @property
    def per_channel(self) -> bool:
        """Whether every channel of a key has a decay of its own."""
        return self.log_decay is not None and self.log_decay.dim() == 4


class Solution(NamedTuple):
    """out [B, H, T, E], normalised; the state after all keys if it was asked for."""

    out: Tensor
    S: Tensor | None = None
    z: Tensor | None = None


Solve = Callable[[Problem], Solution]


def featured(problem: Problem) -> Problem:
    """The same problem on features: maps, scale and key_mask are done, identity maps are left.

    q, k, v and beta are in the compute dtype (float64 for float64 inputs, else float32);
    log_decay and beta have Hk heads. A masked key is a row of zeros without decay.
    """
    dtype, heads = compute_dtype(problem.q.dtype), problem.k.shape[1]
    k, v, log_decay, beta = problem.k, problem.v, problem.log_decay, problem.beta
    masked = None
    if problem.key_mask is not None:  # before anything else: NaN there has no gradient either
        masked = ~problem.key_mask[:, None]
        k, v = (x.masked_fill(masked[..., None], 0.0) for x in (k, v))
        if beta is not None:
            beta = beta.masked_fill(masked, 0.0)
        if log_decay is not None:
            where = masked[..., None] if problem.per_channel else masked
            log_decay = log_decay.masked_fill(where, 0.0)
    q, k = problem.query_map.apply(problem.q.to(dtype)), problem.key_map.apply(k.to(dtype))
    if masked is not None and not problem.key_map.keeps_zero:
        k = k.masked_fill(masked[..., None], 0.0)
    if isinstance(problem.scale, Tensor):
        q = q * problem.scale.to(dtype).reshape(-1, 1, 1)
    elif problem.scale is not None:
        q = q * problem.scale
    if log_decay is not None and log_decay.shape[1] != heads:
        log_decay = log_decay.expand(-1, heads, *log_decay.shape[2:])
    if beta is not None:
        beta = beta.to(dtype).expand(-1, heads, -1)
    return problem._replace(
        q=q, k=k, v=v.to(dtype), query_map=IDENTITY, key_map=IDENTITY, scale=None,
        key_mask=None, log_decay=log_decay, beta=beta,
    )  # fmt: skip


def each_sequence(solve: Solve) -> Solve:
    """`solve`, which knows no packed sequences, on one after the other."""

    def solve_each(problem: Problem) -> Solution:
        if problem.cu_seqlens is None:
            return solve(problem)
        B, H, T, D = problem.q.shape
        _, Hk, S, E = problem.v.shape
        sizes = Sizes(B, H, Hk, T, S, D, E)
        pieces = spans("", problem.cu_seqlens, problem.cu_seqlens_k, sizes)
        whole = problem._replace(cu_seqlens=None, cu_seqlens_k=None)
        found = [solve(_piece(whole, row, span)) for row, span in enumerate(pieces)]
        if not found:
            return solve(whole)
        out, S_, z = zip(*found, strict=True)
        return Solution(torch.cat(out, 2), _stack(S_), _stack(z))

    return solve_each


def _piece(problem: Problem, row: int, span: Span) -> Problem:
    """Sequence number `row` of a pack."""

    def keys(x: Tensor | None, axis: int) -> Tensor | None:
        return None if x is None else x.narrow(axis, span.s0, span.s1 - span.s0)

    def of_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[row : row + 1]

    return problem._replace(
        q=problem.q[:, :, span.t0 : span.t1],
        k=problem.k[:, :, span.s0 : span.s1],
        v=problem.v[:, :, span.s0 : span.s1],
        key_mask=keys(problem.key_mask, 1),
        log_decay=keys(problem.log_decay, 2),
        beta=keys(problem.beta, 2),
        S=of_row(problem.S),
        z=of_row(problem.z),
    )


def _stack(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
