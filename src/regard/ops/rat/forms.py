"""The forms of `rat_attention`: kernels for the two steps, or the equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.accumulate import rows_by
from regard.core.dispatch import Form
from regard.core.precision import compute_dtype, without_autocast
from regard.ops.rat import native, step
from regard.ops.rat.call import Call
from regard.ops.rat.grid import Grid, lay, remember, tables
from regard.ops.rat.native import attend_native, scan_native
from regard.ops.rat.reference import rat_attention_reference
from regard.ops.rat.registered import attend_eager, scan_eager

Scan = Callable[[Tensor, Tensor, Tensor, int], Tensor]
Attend = Callable[..., tuple[Tensor, Tensor]]


def _run(call: Call, scan: Scan, attend: Attend) -> Any:
    with without_autocast(call.q):
        if call.key_mask is not None:  # before anything is computed: NaN there has no gradient
            real = call.key_mask[:, None, :, None]
            k, v, gate = (torch.where(real, x, 0.0) for x in (call.k, call.v, call.gate))
            call = call.one(call.q, k, v, gate, call.key_mask)
        grid = lay(call)
        v = scan(grid.v, grid.gate, _carry(call, "v"), call.chunk)
        k, table = None, (None, None)
        if call.chunk_length is None:
            out = _own(call, grid, v)
        else:
            k = scan(grid.k, grid.gate, _carry(call, "k"), call.chunk)
            table = tables(call, grid)
            out = _attend(call, grid, k, v, table, attend)
        out = out.to(call.q.dtype)
        return (out, remember(call, grid, k, v, table)) if call.return_state else out


def _carry(call: Call, name: str) -> Tensor:
    """The running key or value of the open chunk [B, Hk, D]."""
    if call.state is not None:
        return call.state[name]
    (B, Hk, _, D), dtype = call.k.shape, compute_dtype(call.q.dtype)
    return call.k.new_zeros(B, Hk, D, dtype=dtype)


def _attend(
    call: Call, grid: Grid, k: Tensor, v: Tensor, table: tuple[Tensor | None, Tensor | None],
    attend: Attend,
) -> Tensor:  # fmt: skip
    q, scale = call.q.to(k.dtype), call.q.shape[3] ** -0.5 if call.scale is None else call.scale
    if isinstance(scale, Tensor):
        q, scale = q * scale.to(k.dtype).reshape(-1, 1, 1), 1.0
    if call.state is None:
        past = k[:, :, :0], v[:, :, :0]
    else:
        past = call.state["ends_k"].to(k.dtype), call.state["ends_v"].to(k.dtype)
    count = None if grid.finished is None else grid.finished.int()
    given = q, k, v, *past, count, grid.place, *table, float(scale), call.chunk, grid.offset
    return attend(*given)[0]


def _own(call: Call, grid: Grid, v: Tensor) -> Tensor:
    """One chunk that never ends: the softmax is over a query's own entry, and gives its value."""
    T, group, offset = call.q.shape[2], call.q.shape[1] // v.shape[1], grid.offset
    if grid.place is not None:
        place = grid.place.long()[:, None]  # several queries may share one
        out = rows_by(v, place.clamp(min=0)).masked_fill((place < 0)[..., None], 0.0)
    elif offset < 0:  # queries before the first key
        blind = min(-offset, T)
        out = pad(v[:, :, : T - blind], (0, 0, blind, 0))
    else:
        out = v[:, :, offset : offset + T].clone()
    out = out.repeat_interleave(group, 1) if group > 1 else out
    for x in (call.q, call.k, call.scale):
        if isinstance(x, Tensor) and x.requires_grad and x is not call.v:
            # Its gradient is 0 all the same, and whatever it holds reaches nothing.
            out = out + torch.zeros_like(x).where(x.new_ones((), dtype=torch.bool), x).sum()
    return out


def _native(call: Call) -> Any:
    return _run(call, scan_native, attend_native)


def _eager(call: Call) -> Any:
    return _run(call, scan_eager, attend_eager)


def _reference(call: Call) -> Any:
    with without_autocast(call.q):
        return rat_attention_reference(
            call.q, call.k, call.v, call.gate, chunk_length=call.chunk_length, scale=call.scale,
            rope=call.rope or False, key_mask=call.key_mask, state=call.state,
            return_state=call.return_state,
        )  # fmt: skip


FORMS = (
    Form("eager", "step", step.refuse, step.run),
    Form("native", "tiles", lambda call: native.refuse(call.q), _native),
    Form("eager", "blocks", lambda call: None, _eager),
    Form("reference", "reference", lambda call: None, _reference, auto=False),
)
