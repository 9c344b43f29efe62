"""Tokens laid on places, `chunk` to a chunk, and the state that is left behind.

A chunk that an earlier call began is begun again here: its tokens so far take up the first places
of chunk 0, with a gate of 1 and nothing to add, so that its running sums pass them unchanged. A
chunk is open until the next token comes: a state ends with 1 to L tokens in it, if any. Rows of
which some tokens are masked have theirs moved together, each behind its own open chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.precision import compute_dtype
from regard.core.state import FixedState
from regard.ops.rat.attend import turned
from regard.ops.rat.call import ONE_CHUNK, Call


@dataclass(frozen=True)
class Grid:
    """Keys, values and gates [B, Hk, places, D] in the compute dtype, and where queries stand."""

    k: Tensor
    v: Tensor
    gate: Tensor
    offset: int  # query i stands at place i + offset, or at most there
    place: Tensor | None = None  # [B, T] int32
    finished: Tensor | None = None  # chunks of earlier calls, per row [B]
    count: Tensor | None = None  # real tokens after this call [B]
    last: Tensor | None = None  # the place of the last one [B], 0 where none is


def lay(call: Call) -> Grid:
    """The tokens of a call."""
    dtype = compute_dtype(call.q.dtype)
    k, v, gate = (x.to(dtype) for x in (call.k, call.v, call.gate))
    held = call.state is not None and "count" in call.state.tensors
    if call.key_mask is not None or held:
        return _lay_ragged(call, k, v, gate)
    behind = call.k.shape[2] - call.q.shape[2]
    opened = _opened(call.length, call.chunk)
    if opened + k.shape[2] == 0:  # one place at least, for the kernels
        return Grid(*_padded(k, v, gate, 0, 1), behind)
    return Grid(*_padded(k, v, gate, opened, 0), behind + opened)


def _opened(length: int, chunk: int) -> int:
    """Tokens in the open chunk; of a chunk without end it matters only whether there are any."""
    if length == 0 or chunk == ONE_CHUNK:
        return min(length, 1)
    return length - (length - 1) // chunk * chunk


def _padded(
    k: Tensor, v: Tensor, gate: Tensor, before: int, after: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not before and not after:
        return k, v, gate
    wide = (0, 0, before, after)
    return pad(k, wide), pad(v, wide), pad(gate, wide, value=1.0)


def _lay_ragged(call: Call, k: Tensor, v: Tensor, gate: Tensor) -> Grid:
    (B, _, S, _), T, chunk, device = k.shape, call.q.shape[2], call.chunk, k.device
    real = call.key_mask
    if real is None:
        real = torch.ones(B, S, dtype=torch.bool, device=device)
    if call.state is None:
        count = torch.zeros(B, dtype=torch.int64, device=device)
    elif "count" in call.state.tensors:
        count = call.state["count"]
    else:
        count = torch.full((B,), call.length, dtype=torch.int64, device=device)
    if chunk == ONE_CHUNK:
        finished, opened = torch.zeros_like(count), count.clamp(max=1)
    else:
        finished = torch.div((count - 1).clamp(min=0), chunk, rounding_mode="floor")
        opened = count - finished * chunk
    most = min(call.length, 1 if chunk == ONE_CHUNK else chunk)
    before = torch.nn.functional.pad(real.cumsum(1), (1, 0))  # real tokens up to each, [B, S + 1]
    new = before[:, -1]
    if S:
        # Place x of a row holds its real token number x - opened.
        number = torch.arange(most + S, device=device) - opened[:, None]
        there = ((number >= 0) & (number < new[:, None]))[:, None, :, None]
        order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        token = order.gather(1, number.clamp(0, S - 1))[:, None, :, None]
        token = token.expand(B, k.shape[1], most + S, k.shape[3])
        k, v = (torch.where(there, x.gather(2, token), 0.0) for x in (k, v))
        gate = torch.where(there, gate.gather(2, token), 1.0)
    else:
        k, v, gate = _padded(k, v, gate, max(most, 1), 0)
    seen = before.index_select(1, (torch.arange(T, device=device) + S - T + 1).clamp(min=0))
    count = count + new
    return Grid(
        k, v, gate, most + S - T, (opened[:, None] + seen - 1).int(), finished, count,
        (opened + new - 1).clamp(min=0),
    )  # fmt: skip


def tables(call: Call, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
    """Cosine and sine of the angles of every chunk of the grid, [1 | B, chunks, D / 2]."""
    if call.rope is None:
        return None, None
    L, places, device = call.chunk, grid.k.shape[2], grid.k.device
    number = torch.arange((places + L - 1) // L, device=device)[None]
    if grid.finished is None:
        number = number + max(call.length - 1, 0) // L
    else:
        number = number + grid.finished[:, None]
    half = grid.k.shape[3] // 2
    power = torch.arange(half, dtype=torch.float64, device=device) / half
    angle = number[..., None] * torch.pow(call.rope, -power)
    return angle.cos().to(grid.k.dtype), angle.sin().to(grid.k.dtype)


def remember(
    call: Call, grid: Grid, k: Tensor | None, v: Tensor, table: tuple[Tensor | None, Tensor | None]
) -> FixedState:
    """The state after a call, from averages k, v on the grid; k is None with one chunk only."""
    length = call.length + call.k.shape[2]
    kept = {}
    if k is not None:
        kept["ends_k"], kept["ends_v"] = _ends(call, grid, k, v, table, length)
        kept["k"] = _at_last(grid, k)
    kept["v"] = _at_last(grid, v)
    if grid.count is not None:
        kept["count"] = grid.count
    return FixedState(call.name, length, kept)


def _at_last(grid: Grid, x: Tensor) -> Tensor:
    if grid.last is None:
        return x[:, :, -1].clone()
    at = grid.last[:, None, None, None].expand(-1, x.shape[1], 1, x.shape[3])
    return x.gather(2, at).squeeze(2)


def _ends(
    call: Call, grid: Grid, k: Tensor, v: Tensor, table: tuple[Tensor | None, Tensor | None],
    length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Turned keys and values of all finished chunks, [B, Hk, slots, D], in the inputs' dtype."""
    L, dtype, slots = call.chunk, call.q.dtype, max(length - 1, 0) // call.chunk
    held = None if call.state is None else (call.state["ends_k"], call.state["ends_v"])
    old = 0 if held is None else held[0].shape[2]
    if grid.finished is None:
        last = slice(L - 1, None, L)
        new = [x[:, :, last][:, :, : slots - old] for x in (k, v)]
        if table[0] is not None and table[1] is not None:
            cosine, sine = (x[:, None, : slots - old] for x in table if x is not None)
            new[0] = turned(new[0], cosine, sine)
        new = [x.to(dtype) for x in new]
        if held is not None:
            new = [torch.cat(pair, 2) for pair in zip(held, new, strict=True)]
        return new[0], new[1]
    # Slot j of a row is its old one, or the end of its chunk j - finished of this call.
    assert grid.count is not None
    B, Hk, places, D = k.shape
    slot = torch.arange(slots, device=k.device)
    chunk = slot - grid.finished[:, None]
    used = slot < torch.div((grid.count - 1).clamp(min=0), L, rounding_mode="floor")[:, None]
    last = (chunk * L + L - 1).clamp(0, places - 1)

    def rows(x: Tensor, at: Tensor) -> Tensor:
        return x.gather(2, at[:, None, :, None].expand(B, Hk, slots, D))

    new = [rows(x, last) for x in (k, v)]
    if table[0] is not None and table[1] is not None:
        at = chunk.clamp(0, table[0].shape[1] - 1)[..., None].expand(B, slots, D // 2)
        new[0] = turned(new[0], *(x.gather(1, at)[:, None] for x in table if x is not None))
    new = [x.to(dtype) for x in new]
    if held is not None and old:
        before = slot.clamp(max=old - 1).expand(B, slots)
        is_old = (chunk < 0)[:, None, :, None]
        new = [torch.where(is_old, rows(x, before), y) for x, y in zip(held, new, strict=True)]
    found = [torch.where(used[:, None, :, None], x, 0.0) for x in new]
    return found[0], found[1]
