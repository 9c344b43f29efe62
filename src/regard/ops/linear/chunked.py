"""The recurrence in chunks: inside a chunk a small masked product, between chunks the state.

    o_t = sum_{j <= t, in chunk} w_tj (q_t . k_j) v_j + w_t q_t S      S: state before the chunk
    S  <- w S + sum_j w_j k_j v_j^T                                    w: products of decays

Registered as `regard::linear_fwd` and `regard::linear_bwd`. The backward recomputes the states
(one per chunk), so a call keeps its inputs and nothing else. What a query must not see is
replaced by exact zeros before it is multiplied with anything: a later key may hold 1e30.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regard.core.library import define
from regard.core.precision import without_autocast
from regard.ops.linear.decays import Run, run_decays
from regard.ops.linear.mapped import batched

CHUNK, CHUNK_CUDA = 64, 256  # on a GPU fewer, larger products: each one is a launch


def default_chunk(q: Tensor) -> int:
    """The chunk size that is used when none is asked for."""
    return CHUNK_CUDA if q.device.type == "cuda" else CHUNK


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t with S_t = exp(a_t) S_{t-1} + k_t v_t^T, on features.

    q [B, H, T, F], k [B, Hk, T, F], v [B, Hk, T, E], log_decay [B, Hk, T] or None,
    state [B, Hk, F, E], all of one dtype but log_decay. Returns o [B, H, T, E] and the state.
    O(T chunk (F + E) + T F E) time; forward and backward together keep O(T (F + E)) memory and
    one state per chunk. Raises on double backward.
    """
    return _forward(q, k, v, log_decay, state, chunk or default_chunk(q))


class _Chunks:
    """A call flattened to N = B Hk independent sequences, with G query rows per key, cut up."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, chunk: int):
        B, H, T, F = q.shape
        self.N, self.G, self.T, self.chunk = B * k.shape[1], H // k.shape[1], T, chunk
        self.q = q.reshape(self.N, self.G, T, F)
        self.k, self.v = k.reshape(self.N, T, F), v.reshape(self.N, T, v.shape[3])
        self.log_decay = None if log_decay is None else log_decay.reshape(self.N, T)
        m = min(T, chunk)
        self.earlier = torch.ones(m, m, dtype=torch.bool, device=q.device).tril()

    def spans(self, *, backwards: bool = False) -> Iterator[tuple[int, int]]:
        starts = range(0, self.T, self.chunk)
        for start in reversed(starts) if backwards else starts:
            yield start, min(start + self.chunk, self.T)

    def rows(self, x: Tensor, i: int, j: int) -> Tensor:
        """Query-side x [N, G, T, c] of tokens [i, j) as [N, G m, c]."""
        return x[:, :, i:j].reshape(self.N, self.G * (j - i), x.shape[3])

    def run(self, i: int, j: int) -> Run | None:
        if self.log_decay is None:
            return None
        return run_decays(self.log_decay[:, i:j], self.earlier[: j - i, : j - i], self.k.dtype)

    def scale_rows(self, rows: Tensor, run: Run | None) -> Tensor:
        """Query rows [N, G m, c] times the decay since the chunk began; a new tensor or `rows`."""
        if run is None:
            return rows
        m = rows.shape[1] // self.G
        grouped = rows.view(self.N, self.G, m, rows.shape[2]) * run.entering[:, None]
        return grouped.masked_fill_(~run.seen_entering[:, None], 0.0).view_as(rows)

    def cut(self, scores: Tensor, run: Run | None) -> Tensor:
        """Products [N, G m, m] as [N, G, m, m], in place: exact 0 where the query sees no key."""
        scores = scores.view(self.N, self.G, scores.shape[2], scores.shape[2])
        if run is None:
            return scores.tril_()
        return scores.masked_fill_(~run.seen_inside[:, None], 0.0)


def _keys(k: Tensor, run: Run | None) -> Tensor:
    """Keys [N, m, c] times the decay until the chunk ends."""
    return k if run is None else (k * run.leaving).masked_fill_(~run.seen_leaving, 0.0)


def _through(state: Tensor, run: Run | None) -> Tensor:
    """The state [N, F, E] times the decay over the chunk."""
    return state if run is None else (state * run.whole).masked_fill_(~run.seen_whole, 0.0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        chunks, (B, H, T, F), E = _Chunks(q, k, v, log_decay, chunk), q.shape, v.shape[3]
        out = q.new_empty(chunks.N, chunks.G, T, E)
        past = state.reshape(chunks.N, F, E).clone()
        for i, j in chunks.spans():
            run, queries = chunks.run(i, j), chunks.rows(chunks.q, i, j)
            keys, values = chunks.k[:, i:j], chunks.v[:, i:j]
            scores = chunks.cut(queries @ keys.mT, run)
            if run is not None:
                scores = scores.mul_(run.inside[:, None])
            rows = chunks.scale_rows(queries @ past, run)
            rows = torch.baddbmm(rows, scores.flatten(1, 2), values)
            out[:, :, i:j] = rows.view(chunks.N, chunks.G, j - i, E)
            past = torch.baddbmm(_through(past, run), _keys(keys, run).mT, values)
        return out.view(B, H, T, E), past.view(state.shape)


def _differentiate(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    chunk: int,
    wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        chunks, F, E = _Chunks(q, k, v, log_decay, chunk), q.shape[3], v.shape[3]
        N, G, T = chunks.N, chunks.G, chunks.T
        d_out = d_out.reshape(N, G, T, E)
        dq, dk, dv = q.new_empty(N, G, T, F), q.new_empty(N, T, F), q.new_empty(N, T, E)
        d_decay = q.new_empty(_decay_shape(log_decay, wants_decay))
        decay_rows = d_decay.view(N, T) if wants_decay else None

        past, pasts = state.reshape(N, F, E), []
        for i, j in chunks.spans():
            pasts.append(past)
            run = chunks.run(i, j)
            keys = _keys(chunks.k[:, i:j], run)
            past = torch.baddbmm(_through(past, run), keys.mT, chunks.v[:, i:j])

        future = d_state.reshape(N, F, E).clone()  # the gradient of the state after the chunk
        for i, j in chunks.spans(backwards=True):
            m, run, past = j - i, chunks.run(i, j), pasts.pop()
            queries, gradient = chunks.rows(chunks.q, i, j), chunks.rows(d_out, i, j)
            keys, values = chunks.k[:, i:j], chunks.v[:, i:j]
            scores = chunks.cut(queries @ keys.mT, run)
            products = chunks.cut(gradient @ values.mT, run)
            if run is not None:
                scores = scores.mul_(run.inside[:, None])
            from_past = chunks.scale_rows(gradient @ past.mT, run)
            to_future = _keys(values @ future.mT, run)
            if decay_rows is not None:
                decay_rows[:, i:j] = _decay_gradient(
                    (scores * products).sum(1),
                    (queries * from_past).view(N, G, m, F).sum((1, 3)),
                    (keys * to_future).sum(2),
                    (_through(past, run) * future).sum((1, 2)),
                )
            if run is not None:
                products = products.mul_(run.inside[:, None])
            scores, products = scores.view(N, G * m, m), products.view(N, G * m, m)
            dq[:, :, i:j] = torch.baddbmm(from_past, products, keys).view(N, G, m, F)
            dk[:, i:j] = torch.baddbmm(to_future, products.mT, queries)
            dv[:, i:j] = torch.baddbmm(_keys(keys, run) @ future, scores.mT, gradient)
            gradient = chunks.scale_rows(gradient, run)
            future = torch.baddbmm(_through(future, run), queries.mT, gradient)
        dq, dk, dv = dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
        return dq, dk, dv, d_decay, future.view(state.shape)


def _decay_shape(log_decay: Tensor | None, wanted: bool) -> tuple[int, ...]:
    return tuple(log_decay.shape) if wanted and log_decay is not None else (0,)


def _decay_gradient(inside: Tensor, entering: Tensor, leaving: Tensor, whole: Tensor) -> Tensor:
    """Step l of a chunk decays what goes from a token before l to one at l or after: their sum.

    inside [N, t, j], entering [N, t], leaving [N, j], whole [N] are the parts of <o, do> and
    <S, dS> that pass from j to t, from before the chunk to t, from j to after the chunk, and
    through it. Sums of terms of their own, no differences: nothing cancels, and nothing that
    belongs to later tokens only comes near an earlier step.
    """
    crossing = entering.flip(1).cumsum(1).flip(1) + whole[:, None]
    crossing[:, 1:] += leaving.cumsum(1)[:, :-1]
    crossing[:, 1:] += inside.cumsum(2)[:, 1:, :-1].tril().sum(1)
    return crossing


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_decay, state, ctx.chunk = inputs
    ctx.save_for_backward(q, k, v, log_decay, state)


def _backward_of_forward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    q, k, v, log_decay, state = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    *gradients, d_decay, d_past = _backward(
        d_out, d_state, q, k, v, log_decay, state, ctx.chunk, wanted
    )
    return *gradients, d_decay.to(log_decay.dtype) if wanted else None, d_past, None


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_forward(q, k, v, log_decay, state, chunk):
    return q.new_empty(*q.shape[:3], v.shape[3]), _like(state)


def _fake_backward(d_out, d_state, q, k, v, log_decay, state, chunk, wants_decay):
    d_decay = q.new_empty(_decay_shape(log_decay, wants_decay))
    return _like(q), _like(k), _like(v), d_decay, _like(state)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor state, int chunk"
_backward = define(
    "linear_bwd",
    f"(Tensor d_out, Tensor d_state, {_TENSORS}, bool wants_decay)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _differentiate,
    _fake_backward,
    vmap=batched(lambda *args: _backward(*args)),
)
_forward = define(
    "linear_fwd",
    f"({_TENSORS}) -> (Tensor, Tensor)",
    _attend,
    _fake_forward,
    backward=_backward_of_forward,
    setup_context=_save,
    vmap=batched(lambda *args: _forward(*args)),
)
