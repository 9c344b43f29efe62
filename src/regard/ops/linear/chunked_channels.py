"""The recurrence in chunks where every channel of a key has a decay of its own.

    o_t = sum_{j <= t} sum_f q_tf w_tjf k_jf v_j,      w_tjf = exp(a_{j+1,f} + ... + a_{t,f})

No product of three factors is a product of matrices, but for queries after a token m and keys
up to it, w_tj = w_tm w_mj: half goes to the query, half to the key, neither above 1. So a chunk
is halved again and again; at each of the log2(chunk) levels the second halves read the first
ones in one product, and a token's own key has the weight 1. Between chunks there is the state.

Registered as `regard::linear_channels_fwd` and `regard::linear_channels_bwd`. As in `chunked`,
the backward recomputes the states and no query is multiplied with a later key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.precision import without_autocast
from regard.ops.linear.chunks import decay_shape
from regard.ops.linear.decays import split_steps
from regard.ops.linear.registered import register

CHUNK = 64
TOGETHER = 16  # chunks whose insides are computed at once, and between which a state is kept


def chunked_channels(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t with S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T, on features.

    q [B, H, T, F], k and log_decay [B, Hk, T, F], v [B, Hk, T, E], state [B, Hk, F, E], all of
    one dtype but log_decay. Returns o [B, H, T, E] and the state. A chunk is a power of two:
    the next one from `chunk`. O(T chunk (F + E) + T F (E + log2 chunk)) time; forward and
    backward together keep O(T (F + E)) memory and a state for every 16 chunks. Raises on double
    backward.
    """
    chunk = 1 << ((chunk or CHUNK) - 1).bit_length()
    return _forward(q, k, v, log_decay, state, chunk)


class _Decays:
    """Products of decays in M chunks of m tokens, steps [M, m, F]; exact 0 past a forgetting."""

    def __init__(self, log_decay: Tensor, dtype: torch.dtype) -> None:
        steps, forgets = split_steps(log_decay)
        self.sums, self.cuts, self.dtype = steps.cumsum(1), forgets.cumsum(1), dtype
        self.seen = self.cuts == 0  # the state before the chunk is seen by token t
        self.entering = self._product(self.sums, self.seen)
        last, cut = self.sums[:, -1:], self.cuts[:, -1:]
        self.leaving = self._product(last - self.sums, self.cuts == cut)
        self.whole, self.kept = self.entering[:, -1, :, None], self.seen[:, -1, :, None]

    def _product(self, sums: Tensor, seen: Tensor) -> Tensor:
        return sums.to(self.dtype).masked_fill(~seen, -torch.inf).exp_()

    def halves(self, b: int) -> tuple[Tensor, Tensor]:
        """In blocks of 2 b: from the middle to a token of the second half, and from a token of
        the first half to the middle, each [M, m / 2 b, b, F]."""
        (first, second), (cut_first, cut_second) = _halves(self.sums, b), _halves(self.cuts, b)
        middle, cut = first[:, :, -1:], cut_first[:, :, -1:]
        later = self._product(second - middle, cut_second == cut)
        return later, self._product(middle - first, cut_first == cut)

    def through(self, state: Tensor, n: int) -> Tensor:
        """The state [N, F, E] times the decay over chunk n of all N sequences."""
        whole, kept = (x.unflatten(0, (state.shape[0], -1))[:, n] for x in (self.whole, self.kept))
        return (state * whole).masked_fill_(~kept, 0.0)


def _halves(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Both halves of blocks of 2 b tokens of x [M, m, ...], as [M, m / 2 b, b, ...]."""
    blocks = x.unflatten(1, (-1, 2, b))
    return blocks[:, :, 0], blocks[:, :, 1]


def _sizes(chunk: int) -> Iterator[int]:
    b = 1
    while b < chunk:
        yield b
        b *= 2


class _Span:
    """Tokens [i, j) of a call as M = N n chunks of m tokens, padded with tokens without effect.

    q [M, m, G, F]; k, a [M, m, F]; v [M, m, E]; further tensors of queries by `queries`.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, i: int, j: int, chunk: int
    ) -> None:
        self.N, self.G = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        self.i, self.j, self.chunk, self.n = i, j, chunk, -(-(j - i) // chunk)
        self.q, self.k, self.v = self.queries(q), self.keys(k), self.keys(v)
        self.decays = _Decays(self.keys(log_decay), k.dtype)

    def keys(self, x: Tensor) -> Tensor:
        x = x[:, :, self.i : self.j].flatten(0, 1)
        x = pad(x, (0, 0, 0, self.n * self.chunk - x.shape[1]))
        return x.reshape(x.shape[0] * self.n, self.chunk, x.shape[2])

    def queries(self, x: Tensor) -> Tensor:
        rows = self.keys(x).view(self.N, self.G, self.n, self.chunk, x.shape[3])
        return rows.permute(0, 2, 3, 1, 4).reshape(-1, self.chunk, self.G, x.shape[3])

    def put_keys(self, x: Tensor, into: Tensor) -> None:
        rows = x.reshape(self.N, -1, x.shape[2])[:, : self.j - self.i]
        into[:, :, self.i : self.j] = rows.view(*into.shape[:2], self.j - self.i, -1)

    def put_queries(self, x: Tensor, into: Tensor) -> None:
        rows = x.view(self.N, self.n * self.chunk, self.G, -1)[:, : self.j - self.i].transpose(1, 2)
        into[:, :, self.i : self.j] = rows.reshape(into.shape[0], into.shape[1], -1, x.shape[-1])

    def states(self, past: Tensor) -> list[Tensor]:
        """The state [N, F, E] before each chunk and after the last one."""
        found, leaving = [past], self.k * self.decays.leaving
        for n in range(self.n):
            kept, new = self.decays.through(found[-1], n), self.of(leaving, n).mT
            found.append(torch.baddbmm(kept, new, self.of(self.v, n)))
        return found

    def of(self, x: Tensor, n: int) -> Tensor:
        """Chunk n of x [M, ...], with the rows of a group as rows: [N, m (G), c]."""
        x = x.unflatten(0, (self.N, self.n))[:, n]
        return x.flatten(1, -2)


def _spans(T: int, chunk: int, *, backwards: bool = False) -> Iterator[tuple[int, int]]:
    starts = range(0, T, chunk * TOGETHER)
    for start in reversed(starts) if backwards else starts:
        yield start, min(start + chunk * TOGETHER, T)


def _readable(state: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """A state [N, F, E] that may have overflowed, 0 there, and which tokens [N, m] see it."""
    lost = ~state.isfinite().all(2)
    return state.masked_fill(lost[:, :, None], 0.0), (seen & lost[:, None]).any(2)


def _inside(span: _Span) -> Tensor:
    """What the tokens of each chunk read of each other, [M, m, G, E]."""
    q, k, v, G = span.q, span.k, span.v, span.G
    out = (q * k[:, :, None]).sum(3, keepdim=True) * v[:, :, None]
    for b in _sizes(span.chunk):
        later, earlier = span.decays.halves(b)
        queries = (_halves(q, b)[1] * later[:, :, :, None]).flatten(2, 3)
        scores = queries @ (_halves(k, b)[0] * earlier).mT
        _halves(out, b)[1].add_((scores @ _halves(v, b)[0]).unflatten(2, (b, G)))
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    with without_autocast(q):
        out = q.new_empty(*q.shape[:3], v.shape[3])
        past = state.flatten(0, 1).clone()
        for i, j in _spans(k.shape[2], chunk):
            span = _Span(q, k, v, log_decay, i, j, chunk)
            rows, decays = _inside(span), span.decays
            entering, states = span.q * decays.entering[:, :, None], span.states(past)
            by_chunk, past = rows.unflatten(0, (span.N, span.n)), states[-1]
            for n in range(span.n):
                usable, blind = _readable(states[n], span.of(decays.seen, n))
                read = (span.of(entering, n) @ usable).unflatten(1, (chunk, span.G))
                by_chunk[:, n] += read.masked_fill_(blind[:, :, None, None], torch.nan)
            span.put_queries(rows, out)
        return out, past.view(state.shape)


def _differentiate(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    chunk: int,
    wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        d_decay = q.new_empty(decay_shape(log_decay, wants_decay))
        T, past, pasts = k.shape[2], state.flatten(0, 1), []
        for i, j in _spans(T, chunk):
            pasts.append(past)
            past = _Span(q[:, :, :0], k, v, log_decay, i, j, chunk).states(past)[-1]
        future = d_state.flatten(0, 1).clone()  # the gradient of the state after the chunk
        for i, j in _spans(T, chunk, backwards=True):
            span = _Span(q, k, v, log_decay, i, j, chunk)
            found, states = _Gradients(span, span.queries(d_out)), span.states(pasts.pop())
            for n in reversed(range(span.n)):
                future = found.between(n, states[n], future)
            span.put_queries(found.dq, dq)
            span.put_keys(found.dk, dk)
            span.put_keys(found.dv, dv)
            if wants_decay:
                span.put_keys(found.d_decay, d_decay)
        return dq, dk, dv, d_decay, future.view(state.shape)


class _Gradients:
    """The gradients of one span: what passes inside its chunks at once, the rest by chunk.

    Step l decays what goes from a token before l to one at l or after, channel by channel: sums
    of terms of their own, as in `chunks.decay_gradient`.
    """

    def __init__(self, span: _Span, d_out: Tensor) -> None:
        self.span, self.d_out = span, d_out
        q, k, v, G = span.q, span.k, span.v, span.G
        product = (d_out * v[:, :, None]).sum(3, keepdim=True)
        self.dq, self.dk = product * k[:, :, None], (product * q).sum(2)
        self.dv = ((q * k[:, :, None]).sum(3, keepdim=True) * d_out).sum(2)
        self.d_decay = torch.zeros_like(k)
        for b in _sizes(span.chunk):
            later, earlier = span.decays.halves(b)
            queries = (_halves(q, b)[1] * later[:, :, :, None]).flatten(2, 3)
            keys, values = _halves(k, b)[0] * earlier, _halves(v, b)[0]
            gradient = _halves(d_out, b)[1].flatten(2, 3)
            products = gradient @ values.mT
            d_queries, d_keys = products @ keys, products.mT @ queries
            _halves(self.dv, b)[0].add_((queries @ keys.mT).mT @ gradient)
            to_middle = (queries * d_queries).unflatten(2, (b, G)).sum(3)
            first, second = _halves(self.d_decay, b)
            second.add_(_from_here_on(to_middle, 2))
            first.add_(_before(keys * d_keys, 2))
            shares = d_queries.unflatten(2, (b, G)) * later[:, :, :, None]
            _halves(self.dq, b)[1].add_(shares)
            _halves(self.dk, b)[0].add_(d_keys * earlier)

    def between(self, n: int, past: Tensor, future: Tensor) -> Tensor:
        """Adds what passes from before chunk n into it and from it to after; the gradient of
        the state before it."""
        span, decays, m = self.span, self.span.decays, self.span.chunk
        of = span.of
        entering, leaving = of(decays.entering, n), of(decays.leaving, n)
        usable, _ = _readable(past, of(decays.seen, n))
        gradient, values = of(self.d_out, n), of(span.v, n)
        from_past = (gradient @ usable.mT).unflatten(1, (m, span.G)) * entering[:, :, None]
        to_future = (values @ future.mT) * leaving
        queries, keys = of(span.q, n).unflatten(1, (m, span.G)), of(span.k, n)
        crossing = (decays.through(usable, n) * future).sum(2)[:, None]
        crossing = crossing + _from_here_on((queries * from_past).sum(2), 1)
        self._chunk(self.d_decay, n).add_(crossing + _before(keys * to_future, 1))
        self._chunk(self.dq, n).add_(from_past)
        self._chunk(self.dk, n).add_(to_future)
        self._chunk(self.dv, n).add_((keys * leaving) @ future)
        queries = (queries * entering[:, :, None]).flatten(1, 2)
        return torch.baddbmm(decays.through(future, n), queries.mT, gradient)

    def _chunk(self, x: Tensor, n: int) -> Tensor:
        return x.unflatten(0, (self.span.N, self.span.n))[:, n]


def _from_here_on(x: Tensor, axis: int) -> Tensor:
    return x.flip(axis).cumsum(axis).flip(axis)


def _before(x: Tensor, axis: int) -> Tensor:
    """Sums over the tokens before each one: shifted, not subtracted."""
    sums = torch.zeros_like(x)
    length = x.shape[axis] - 1
    sums.narrow(axis, 1, length).copy_(x.narrow(axis, 0, length).cumsum(axis))
    return sums


_forward = register("linear_channels", (), _attend, _differentiate)
