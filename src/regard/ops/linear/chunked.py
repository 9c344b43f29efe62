"""The recurrence in chunks: inside a chunk a small masked product, between chunks the state.

    o_t = sum_{j <= t, in chunk} w_tj (q_t . k_j) v_j + w_t q_t S      S: state before the chunk
    S  <- w S + sum_j w_j k_j v_j^T                                    w: products of decays

Registered as `regard::linear_fwd` and `regard::linear_bwd`. The backward recomputes the states
(one per chunk), so a call keeps its inputs and nothing else. What a query must not see is
replaced by exact zeros before it is multiplied with anything: a later key may hold 1e30.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import without_autocast
from regard.ops.linear.chunks import Chunks, decay_gradient, decay_shape, through, to_end
from regard.ops.linear.registered import register

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


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        chunks, (B, H, T, F), E = Chunks(q, k, v, log_decay, chunk), q.shape, v.shape[3]
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
            past = torch.baddbmm(through(past, run), to_end(keys, run).mT, values)
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
        chunks, F, E = Chunks(q, k, v, log_decay, chunk), q.shape[3], v.shape[3]
        N, G, T = chunks.N, chunks.G, chunks.T
        d_out = d_out.reshape(N, G, T, E)
        dq, dk, dv = q.new_empty(N, G, T, F), q.new_empty(N, T, F), q.new_empty(N, T, E)
        d_decay = q.new_empty(decay_shape(log_decay, wants_decay))
        decay_rows = d_decay.view(N, T) if wants_decay else None

        past, pasts = state.reshape(N, F, E), []
        for i, j in chunks.spans():
            pasts.append(past)
            run = chunks.run(i, j)
            keys = to_end(chunks.k[:, i:j], run)
            past = torch.baddbmm(through(past, run), keys.mT, chunks.v[:, i:j])

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
            to_future = to_end(values @ future.mT, run)
            if decay_rows is not None:
                decay_rows[:, i:j] = decay_gradient(
                    (scores * products).sum(1),
                    (queries * from_past).view(N, G, m, F).sum((1, 3)),
                    (keys * to_future).sum(2),
                    (through(past, run) * future).sum((1, 2)),
                )
            if run is not None:
                products = products.mul_(run.inside[:, None])
            scores, products = scores.view(N, G * m, m), products.view(N, G * m, m)
            dq[:, :, i:j] = torch.baddbmm(from_past, products, keys).view(N, G, m, F)
            dk[:, i:j] = torch.baddbmm(to_future, products.mT, queries)
            dv[:, i:j] = torch.baddbmm(to_end(keys, run) @ future, scores.mT, gradient)
            gradient = chunks.scale_rows(gradient, run)
            future = torch.baddbmm(through(future, run), queries.mT, gradient)
        dq, dk, dv = dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
        return dq, dk, dv, d_decay, future.view(state.shape)


_forward = register("linear", (), _attend, _differentiate)
