"""The delta rule in chunks: what every token writes, by forward substitution, then as `chunked`.

    S_t = w_t S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - w_t S_{t-1}^T k_t)       w: decays

is linear attention with the values u. Inside a chunk, with S the state before it and products of
decays w_tj from j to t,

    u_t + beta_t sum_{j < t} w_tj (k_t . k_j) u_j = beta_t (v_t - w_t S^T k_t):

one unit triangular system for all columns at once. Its transpose gives the gradient.

Registered as `regard::linear_delta_fwd` and `regard::linear_delta_bwd`. As in `chunked`, the
backward recomputes the states and what a token must not see is an exact zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import without_autocast
from regard.ops.linear.chunks import Chunks, decay_gradient, decay_shape, through, to_end
from regard.ops.linear.decays import Run
from regard.ops.linear.registered import register

CHUNK = 64


def chunked_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = S_t^T q_t and the last state.

    q [B, H, T, F], or [B, H, 0, F] for the state alone; k [B, Hk, T, F], v [B, Hk, T, E],
    beta [B, Hk, T], log_decay [B, Hk, T] or None, state [B, Hk, F, E]; all of one dtype but
    log_decay. O(T chunk (F + E + chunk) + T F E) time; forward and backward together keep
    O(T (F + E)) memory and one state per chunk. Raises on double backward.
    """
    return _forward(q, k, v, beta, log_decay, state, chunk or CHUNK)


def encode_delta(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    chunk: int | None = None,
) -> Tensor:
    """The state after all keys, [B, Hk, F, E]."""
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    return chunked_delta(k[:, :, :0], k, v, beta, log_decay, state, chunk)[1]


def _entering(x: Tensor, run: Run | None) -> Tensor:
    """Rows [N, m, c] times the decay since the chunk began."""
    return x if run is None else (x * run.entering).masked_fill_(~run.seen_entering, 0.0)


def _earlier(products: Tensor, run: Run | None) -> Tensor:
    """Products [N, m, m] of token t with token j < t, in place: exact 0 where t sees no j."""
    products = products.tril_(-1)
    return products if run is None else products.masked_fill_(~run.seen_inside, 0.0)


def _overlaps(keys: Tensor, run: Run | None) -> Tensor:
    """w_tj (k_t . k_j) for j < t, [N, m, m]."""
    products = _earlier(keys @ keys.mT, run)
    return products if run is None else products.mul_(run.inside)


def _written(
    keys: Tensor, values: Tensor, strength: Tensor, past: Tensor, run: Run | None
) -> Tensor:
    """u of one chunk, [N, m, E]."""
    right = (values - _entering(keys @ past, run)) * strength
    system = _overlaps(keys, run).mul_(strength)
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def _finite(written: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens write [N, m, E], 0 where it has overflowed, and where that is, [N, m].

    Keys that are not normalised may make the state explode: rows that do not see the token must
    not meet it as 0 * inf.
    """
    lost = ~written.isfinite().all(-1)
    return written.masked_fill(lost[..., None], 0.0), lost


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        chunks, (B, H, T, F), E = Chunks(q, k, v, log_decay, chunk), q.shape, v.shape[3]
        strengths = beta.reshape(chunks.N, chunks.T, 1)
        out = q.new_empty(chunks.N, chunks.G, T, E)
        past = state.reshape(chunks.N, F, E).clone()
        for i, j in chunks.spans():
            run, keys = chunks.run(i, j), chunks.k[:, i:j]
            written = _written(keys, chunks.v[:, i:j], strengths[:, i:j], past, run)
            if T:
                queries = chunks.rows(chunks.q, i, j)
                scores = chunks.cut(queries @ keys.mT, run)
                if run is not None:
                    scores = scores.mul_(run.inside[:, None])
                usable, lost = _finite(written)
                seen = chunks.earlier[: j - i, : j - i] if run is None else run.seen_inside
                blind = (seen & lost[:, None, :]).any(-1)
                rows = chunks.scale_rows(queries @ past, run)
                rows = torch.baddbmm(rows, scores.flatten(1, 2), usable)
                rows = rows.view(chunks.N, chunks.G, j - i, E)
                out[:, :, i:j] = rows.masked_fill_(blind[:, None, :, None], torch.nan)
            past = torch.baddbmm(through(past, run), to_end(keys, run).mT, written)
        return out.view(B, H, T, E), past.view(state.shape)


def _differentiate(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    chunk: int,
    wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        chunks, F, E = Chunks(q, k, v, log_decay, chunk), q.shape[3], v.shape[3]
        N, G, T, reads = chunks.N, chunks.G, chunks.T, q.shape[2] > 0
        strengths = beta.reshape(N, T, 1)
        d_out = d_out.reshape(N, G, q.shape[2], E)
        dq = q.new_empty(N, G, q.shape[2], F)
        dk, dv, d_beta = q.new_empty(N, T, F), q.new_empty(N, T, E), q.new_empty(N, T)
        d_decay = q.new_empty(decay_shape(log_decay, wants_decay))
        decay_rows = d_decay.view(N, T) if wants_decay else None

        past, kept = state.reshape(N, F, E), []
        for i, j in chunks.spans():
            run, keys = chunks.run(i, j), chunks.k[:, i:j]
            written = _written(keys, chunks.v[:, i:j], strengths[:, i:j], past, run)
            kept.append(past)
            dv[:, i:j] = _finite(written)[0]  # until its own gradient takes the place
            past = torch.baddbmm(through(past, run), to_end(keys, run).mT, written)

        future = d_state.reshape(N, F, E).clone()  # the gradient of the state after the chunk
        for i, j in chunks.spans(backwards=True):
            run, keys, strength = chunks.run(i, j), chunks.k[:, i:j], strengths[:, i:j]
            past, written = kept.pop(), dv[:, i:j].clone()
            overlaps, entered = _overlaps(keys, run), _entering(keys @ past, run)
            overlaps = overlaps.masked_fill_(~overlaps.isfinite(), 0.0)
            d_written, to_future = to_end(keys, run) @ future, to_end(written @ future.mT, run)
            d_keys, d_past = to_future, through(future, run)
            part = _Part(keys, to_future, past, future, run)
            if reads:
                queries, gradient = chunks.rows(chunks.q, i, j), chunks.rows(d_out, i, j)
                scores = chunks.cut(queries @ keys.mT, run)
                products = chunks.cut(gradient @ written.mT, run)
                if run is not None:
                    scores = scores.mul_(run.inside[:, None])
                from_past = chunks.scale_rows(gradient @ past.mT, run)
                if decay_rows is not None:
                    part.inside += (scores * products).sum(1)
                    part.entering += (queries * from_past).view(N, G, j - i, F).sum((1, 3))
                if run is not None:
                    products = products.mul_(run.inside[:, None])
                scores, products = scores.flatten(1, 2), products.flatten(1, 2)
                dq[:, :, i:j] = torch.baddbmm(from_past, products, keys).view(N, G, j - i, F)
                d_written = torch.baddbmm(d_written, scores.mT, gradient)
                d_keys = torch.baddbmm(d_keys, products.mT, queries)
                d_past = torch.baddbmm(d_past, queries.mT, chunks.scale_rows(gradient, run))
            # The triangular system, transposed: the gradient of its right side.
            d_right = torch.linalg.solve_triangular(
                (overlaps * strength).mT, d_written, upper=True, unitriangular=True
            )
            d_values = d_right * strength
            pairs = _earlier(d_right @ written.mT, run)  # minus the gradient of the system
            error = chunks.v[:, i:j] - entered
            d_beta[:, i:j] = (d_right * error).sum(2) - (pairs * overlaps).sum(2)
            pairs = pairs.mul_(strength)
            if decay_rows is not None:
                part.inside -= pairs * overlaps
                part.entering -= (d_values * entered).sum(2)
                decay_rows[:, i:j] = part.gradient()
            if run is not None:
                pairs = pairs.mul_(run.inside)
            d_entered = _entering(d_values, run)
            d_keys = torch.baddbmm(d_keys, pairs + pairs.mT, keys, alpha=-1)
            dk[:, i:j] = torch.baddbmm(d_keys, d_entered, past.mT, alpha=-1)
            dv[:, i:j] = d_values
            future = torch.baddbmm(d_past, keys.mT, d_entered, alpha=-1)
        gradients = dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), d_beta.view(beta.shape)
        return *gradients, d_decay, future.view(state.shape)


class _Part:
    """What a step of a chunk decays, collected for `decay_gradient`."""

    def __init__(
        self, keys: Tensor, to_future: Tensor, past: Tensor, future: Tensor, run: Run | None
    ) -> None:
        N, m, _ = keys.shape
        self.inside, self.entering = keys.new_zeros(N, m, m), keys.new_zeros(N, m)
        self._leaving = keys, to_future
        self._whole = past, future, run

    def gradient(self) -> Tensor:
        keys, to_future = self._leaving
        past, future, run = self._whole
        whole = (through(past, run) * future).sum((1, 2))
        return decay_gradient(self.inside, self.entering, (keys * to_future).sum(2), whole)


_forward = register("linear_delta", ("beta",), _attend, _differentiate)
