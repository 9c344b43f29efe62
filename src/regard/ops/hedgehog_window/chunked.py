"""The window and what lies behind it, in chunks of queries: time and memory linear in T.

A query sees its last `reach` keys through softmax and all older ones through their features.
reach is the window's length where it slides; w + 1 + (n mod w) for the n-th token where it is
terraced: the query's own block of w and the whole one before. With reaches up to M, a chunk of
queries whose first one stands at key a finds keys before a - M + 1 in the state (S, z), and the
following ones are weighed one by one, by softmax or by features.

It has a loop of its own, and is not a call of the linear engine, because both parts share one
normaliser and the softmax part needs these keys as they are. Plain autograd.

A masked token takes no place. Real keys are therefore brought together first, behind those that a
state kept, and every row of the batch has its own place of a query among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.precision import compute_dtype
from regard.ops.hedgehog_window.call import Call
from regard.ops.linear.learned_features import learned, to_heads
from regard.ops.linear.normaliser import mean

CHUNK = 64  # queries at least: smaller products do not pay for their calls

Place = int | Tensor  # of a key: one number, or one per row of the batch [B]


@dataclass
class _Keys:
    """All keys of a call: those of the state [B, Hk, M, D], then the real new ones."""

    k: Tensor
    v: Tensor
    place: Tensor | None  # [B, T], the last key that a query sees; None: query t sees t + offset
    offset: int
    count: Tensor | None  # [B], real tokens before the first key here (may be negative); None: 0
    end: Place  # behind the last real key

    @property
    def length(self) -> int:
        return self.k.shape[2]


def chunked(call: Call) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Output [B, H, T, Dv] in the compute dtype, and the tensors of the state if asked for."""
    dtype, (B, _, T, D) = compute_dtype(call.q.dtype), call.q.shape
    keys, M, heads = _gather(call, dtype), call.kept, call.key_heads
    options = call.activation, call.full_space, call.skip
    map_q = learned(call.map_q, call.bias_q, *options, of_queries=True).apply
    map_k = learned(call.map_k, call.bias_k, *options, of_queries=False).apply
    q = call.q.to(dtype)
    scale, gamma = (
        x.to(dtype).reshape(-1, 1, 1) if isinstance(x, Tensor) else x
        for x in (D**-0.5 if call.scale is None else call.scale, call.gamma)
    )
    scaled, asking = q * scale, map_q(q)
    if call.affine:
        asking = asking * (1 - gamma)  # whatever is read through features has the factor

    def advance(state: Tensor, start: Place, count: int, stop: Place) -> Tensor:
        """The state with keys [start, stop), of which there are at most `count`."""
        k, v, number = _take(keys.k, start, count), _take(keys.v, start, count), None
        features = map_k(to_heads(k, heads))
        if keys.count is not None:
            number = _numbers(start, count, q.device)
            used = (number < stop[:, None] if isinstance(stop, Tensor) else number < stop) & (
                number + keys.count[:, None] >= 0
            )
            features = features.masked_fill(~used[:, None, :, None], 0.0)
        return state + features.mT @ pad(to_heads(v, heads), (0, 1), value=1.0)

    state = q.new_zeros(B, heads, call.width, call.v.shape[3] + 1)
    if call.state is not None:
        state = torch.cat([call.state["S"], call.state["z"][..., None]], 3)
    rows: list[Tensor] = []
    at: Place | None = None  # keys before it are in the state
    C = call.chunk_size or max(CHUNK, call.window_length)
    lead = max(0, min(T, -keys.offset)) if keys.place is None else 0
    lead = lead if keys.length else T
    if lead:  # queries before the first key
        rows.append(_grouped(asking[:, :, :lead], state.mT))
    for start in range(lead, T, C):
        stop = min(start + C, T)
        low = _before(keys, start, M - 1)
        if at is None:
            at = low
            whole = low if isinstance(low, int) else keys.length
            state = advance(state, 0, whole, low)
        elif isinstance(low, int) and isinstance(at, int):
            state, at = advance(state, at, low - at, low), low
        else:
            state, at = advance(state, at, C, low), low
        span = min(keys.length, M - 1 + stop - start)
        if isinstance(low, int):
            span = stop + keys.offset - low
        window, behind, far = _visible(call, keys, start, stop, low, span)
        k, v = _take(keys.k, low, span), _take(keys.v, low, span)
        scores = _grouped(scaled[:, :, start:stop], k).masked_fill(~window, -torch.inf)
        most = scores.amax(-1, keepdim=True)
        most = most.masked_fill(most == -torch.inf, 0.0)
        weights = gamma * (scores - most).exp()
        query = asking[:, :, start:stop]
        if far:  # the first so many keys are seen through their features by some query
            near = _grouped(query, map_k(to_heads(k[:, :, :far], heads)))
            near = near.masked_fill(~behind[..., :far], 0.0)
            weights = weights + pad(near, (0, span - far))
        sums = _grouped(weights, pad(v, (0, 1), value=1.0).mT)
        rows.append(sums + _grouped(query, state.mT))
    out = mean(torch.cat(rows, 2) if rows else _grouped(asking, state.mT))
    if not call.return_state:
        return out, None
    return out, _remember(call, keys, state, at, C, advance)


def _gather(call: Call, dtype: torch.dtype) -> _Keys:
    k, v, mask, state = call.k.to(dtype), call.v.to(dtype), call.key_mask, call.state
    (B, _, new, _), T = k.shape, call.q.shape[2]
    if mask is None and state is None:
        return _Keys(k, v, None, new - T, None, new)
    if mask is None:
        mask = torch.ones(B, new, dtype=torch.bool, device=k.device)
    else:  # zeros before anything is computed: NaN there has no gradient either; real ones first
        hidden = ~mask[:, None, :, None]
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        k, v = (_at(x.masked_fill(hidden, 0.0), order) for x in (k, v))
    past, count = 0, k.new_zeros(B, dtype=torch.int64)
    if state is not None:
        past, count = call.kept, state["count"] - call.kept
        k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
    seen = pad(mask.cumsum(1), (1, 0))  # real keys among the first n
    number = torch.arange(new - T + 1, new + 1, device=k.device).clamp(min=0)
    place = past - 1 + seen.index_select(1, number)
    return _Keys(k, v, place, past + new - T, count, past + seen[:, -1])


def _before(keys: _Keys, query: int, count: int) -> Place:
    """The first key in reach: `count` before the one at which a query stands, or the first."""
    if keys.place is None:
        return max(0, query + keys.offset - count)
    return (keys.place[:, query] - count).clamp(min=0)


def _numbers(start: Place, count: int, device: torch.device) -> Tensor:
    """The keys start, start + 1, ...: [1 or B, count]."""
    numbers = torch.arange(count, device=device)
    return start[:, None] + numbers if isinstance(start, Tensor) else (start + numbers)[None]


def _take(x: Tensor, start: Place, count: int) -> Tensor:
    """Keys [start, start + count) of x [B, h, n, c]; what lies behind the last one is the last."""
    if not isinstance(start, Tensor):
        return x[:, :, start : start + count]
    return _at(x, _numbers(start, count, x.device).clamp(max=x.shape[2] - 1))


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, h, n, c] at key index [B, m]."""
    B, h, _, c = x.shape
    return x.gather(2, index[:, None, :, None].expand(B, h, -1, c))


def _grouped(rows: Tensor, columns: Tensor) -> Tensor:
    """rows [B, H, m, c] times columns [B, h, n, c] of the rows' groups: [B, H, m, n]."""
    B, H, m, c = rows.shape
    h, n = columns.shape[1:3]
    return (rows.reshape(B, h, H // h * m, c) @ columns.mT).view(B, H, m, n)


def _visible(
    call: Call, keys: _Keys, start: int, stop: int, low: Place, span: int
) -> tuple[Tensor, Tensor, int]:
    """Which keys [low, low + span) the queries [start, stop) see through softmax, and which through
    their features, [B or 1, 1, queries, span]; the latter are among the first so many."""
    device, w = keys.k.device, call.window_length
    key = _numbers(low, span, device)[:, None]
    if keys.place is None:
        place = torch.arange(start + keys.offset, stop + keys.offset, device=device)[None, :, None]
    else:
        place = keys.place[:, start:stop, None]
    reach, shortest = torch.full_like(place, w), w
    if call.layout == "terraced":
        at = place if keys.count is None else place + keys.count[:, None, None]
        if call.align == "end":
            at = at + (-keys.length) % w
        reach, shortest = w + 1 + at % w, w + 1
    seen = key <= place
    if keys.count is not None:
        seen = seen & (key + keys.count[:, None, None] >= 0)
    near = key > place - reach
    return (seen & near)[:, None], (seen & ~near)[:, None], max(0, span - shortest)


def _remember(
    call: Call,
    keys: _Keys,
    state: Tensor,
    at: Place | None,
    chunk: int,
    advance: Callable[[Tensor, Place, int, Place], Tensor],
) -> dict[str, Tensor]:
    """The state: sums over the keys that no later query will have in reach, and the others."""
    M, B, end = call.kept, call.q.shape[0], keys.end
    if isinstance(end, Tensor):
        first = (end - M).clamp(min=0)
        if at is None:
            state = advance(state, 0, keys.length, first)
        else:
            assert isinstance(at, Tensor)
            state = advance(state, at, chunk, first)
        number = end[:, None] - M + torch.arange(M, device=end.device)
        kept = number >= 0
        k, v = (
            _at(x, number.clamp(0, max(0, keys.length - 1))).masked_fill(
                ~kept[:, None, :, None], 0.0
            )
            if keys.length
            else pad(x, (0, 0, M, 0))
            for x in (keys.k, keys.v)
        )
        assert keys.count is not None
        count = keys.count + end
    else:
        first = max(0, end - M)
        start = 0 if at is None else at
        assert isinstance(start, int)
        if first > start:
            state = advance(state, start, first - start, first)
        k, v = (pad(x[:, :, first:], (0, 0, M - end + first, 0)) for x in (keys.k, keys.v))
        count = torch.full((B,), end, dtype=torch.int64, device=k.device)
    sums = {"S": state[..., :-1].contiguous(), "z": state[..., -1].contiguous()}
    return sums | {"k": k, "v": v, "count": count}
