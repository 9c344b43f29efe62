"""The forms of attention within windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.dispatch import Form
from regard.core.precision import compute_dtype
from regard.ops.block_sparse import native as kernels
from regard.ops.block_sparse import triton
from regard.ops.block_sparse.registered import block_sparse_native
from regard.ops.window import native
from regard.ops.window.reference import window_attention_reference
from regard.ops.window.registered import window

SEQUENCE_TILE = 128  # queries of a tile of a sequence, at most half of its window
SIDE = 8  # and the longest side of a tile of a grid


@dataclass(frozen=True)
class Call:
    """One checked call; `grid` is that of the queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    inward: bool
    causal: bool
    dilation: tuple[int, ...]
    scale: float | Tensor | None
    key_mask: Tensor | None
    tile: tuple[int, ...] | None


def _sides(grid: tuple[int, ...], windows: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Tiles that cost little in keys which only some of their queries see."""
    found = []
    for size, (left, right) in zip(grid, windows, strict=True):
        width = left + right + 1
        if left < 0 and right < 0:
            side = size
        elif left < 0 or right < 0:
            side = SEQUENCE_TILE
        elif len(grid) == 1:
            side = min(SEQUENCE_TILE, max(16, width // 2))
        else:
            side = min(SIDE, max(1, width // 5))
        found.append(max(1, min(side, size)))
    return tuple(found)


def _scaled(call: Call) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values in the dtype of the computation, and what is left to scale by."""
    dtype = compute_dtype(call.q.dtype)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    if isinstance(scale, Tensor):
        return q * scale.to(dtype).reshape(-1, 1, 1), k, v, 1.0
    return q, k, v, scale


def _nothing(q: Tensor, v: Tensor) -> Tensor:
    return (q.sum(3, keepdim=True) * 0.0).expand(-1, -1, -1, v.shape[3])


def _hide(mask: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with zeros where they are masked, and what is added to scores."""
    if mask is None:
        return k, v, None
    k, v = (torch.where(mask[:, None, :, None], x, 0.0) for x in (k, v))
    return k, v, torch.where(mask[:, None], 0.0, -torch.inf).to(k.dtype)


def _eager(call: Call) -> Tensor:
    q, k, v, scale = _scaled(call)
    if not (q.shape[2] and k.shape[2]):
        return _nothing(q, v)
    q = q * scale
    mask, grid, windows = call.key_mask, call.grid, call.windows
    dilated = max(call.dilation) > 1
    if dilated:
        if mask is None:
            mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        q, k, v = (_split(x, grid, call.dilation) for x in (q, k, v))
        mask = _split(mask[:, None, :, None], grid, call.dilation)[:, 0, :, 0]
        grid, windows = _split_axes(grid, windows, call.dilation)
    k, v, bias = _hide(mask, k, v)
    tile = _sides(grid, windows) if call.tile is None or dilated else call.tile
    left, right = ([pair[side] for pair in windows] for side in (0, 1))
    keys = grid if len(grid) > 1 else (k.shape[2],)
    out = window(q, k, v, bias, grid, keys, left, right, call.inward, tile)[0]
    return _join(out, call.grid, call.dilation) if dilated else out


def _native(call: Call) -> Tensor:
    q, k, v, scale = _scaled(call)
    if not (q.shape[2] and k.shape[2]):
        return _nothing(q, v)
    mask, grid, steps = call.key_mask, call.grid, call.dilation
    padded = tuple(_padded(grid, steps))
    if max(steps) > 1:
        if mask is None and padded != grid:
            mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        q, k, v = (native.by_step(_split(x, grid, steps), padded, steps) for x in (q, k, v))
        if mask is not None:
            mask = native.by_step(_split(mask[:, None, :, None], grid, steps), padded, steps)
            mask = mask[:, 0, :, 0]
        grid = tuple(n // d for n, d in zip(padded, steps, strict=True))
    k, v, bias = _hide(mask, k, v)
    if len(grid) == 1 and not call.inward:
        side = None if call.tile is None else call.tile[0]
        out = native.attend_sequence(
            block_sparse_native, q, k, v, bias, call.windows[0], side, scale
        )  # fmt: skip
    else:
        tile = call.tile or native.best_tile(grid, call.windows)
        left, right = ([pair[side] for pair in call.windows] for side in (0, 1))
        out = native.window_native(q, k, v, bias, grid, left, right, call.inward, tile, scale)[0]
    if max(steps) > 1:
        out = _join(native.from_steps(out, padded, steps), call.grid, steps)
    return out


def _refuse_triton(call: Call) -> str | None:
    if len(call.grid) > 1:
        return "it has windows of a sequence, not of a grid"
    if call.inward:
        return "it does not push windows inwards"
    if max(call.dilation) > 1:
        return "its windows are not dilated"
    return None if call.tile is None else "its tiles are fixed"


def _triton(call: Call) -> Tensor:
    return triton.attend(
        call.q, call.k, call.v, None, indices=False, blocks=(1, 1), reach=call.windows[0],
        scale=call.scale, key_mask=call.key_mask,
    )  # fmt: skip


def _padded(grid: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    return [-(-n // d) * d for n, d in zip(grid, dilation, strict=True)]


def _split_axes(
    grid: tuple[int, ...], windows: tuple[tuple[int, int], ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """An axis of n places in steps of d is a grid of n / d steps by d places, d being unseen."""
    axes = zip(_padded(grid, dilation), windows, dilation, strict=True)
    pairs = [((n // d, reach), (d, (0, 0))) for n, reach, d in axes]
    sizes, reaches = zip(*(part for pair in pairs for part in pair), strict=True)
    return tuple(sizes), tuple(reaches)


def _split(x: Tensor, grid: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """x [B, h, N, X] on the grid filled up to multiples of the dilation."""
    whole = x.unflatten(2, grid)
    missing = [m - n for n, m in zip(grid, _padded(grid, dilation), strict=True)]
    return pad(whole, [0, 0, *(part for m in reversed(missing) for part in (0, m))]).flatten(2, -2)


def _join(x: Tensor, grid: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    whole = x.unflatten(2, _padded(grid, dilation))
    for axis, n in enumerate(grid):
        whole = whole.narrow(2 + axis, 0, n)
    return whole.flatten(2, -2)


def _reference(call: Call) -> Tensor:
    return window_attention_reference(
        call.q,
        call.k,
        call.v,
        window=call.windows,
        grid=call.grid if len(call.grid) > 1 else None,
        inward=call.inward,
        causal=call.causal,
        dilation=call.dilation,
        scale=call.scale,
        key_mask=call.key_mask,
    )


FORMS = (
    Form(
        "triton",
        "triton",
        lambda call: _refuse_triton(call) or triton.refuse_unverified(call.q, call.v),
        _triton,
    ),
    Form(
        "triton",
        "triton unverified",
        lambda call: _refuse_triton(call) or triton.refuse(call.q, call.v),
        _triton,
        auto=False,
    ),
    Form("native", "native", lambda call: kernels.unavailable(call.q, call.k), _native),
    Form("eager", "tiles", lambda call: None, _eager),
    Form(
        "reference",
        "reference",
        lambda call: None if call.tile is None else "it has no tiles to size",
        _reference,
        auto=False,
    ),
)
