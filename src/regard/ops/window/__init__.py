"""Attention within windows of a sequence, an image or a video; the engine of local attention.

- `axes.py`: windows on a grid axis by axis, and tiles of queries that share the keys they see
- `registered.py`: attention of tiles to boxes of keys, as torch operators
- `halo.py`: blocks of a map that share a window with a halo; `blocks.py`: as torch operators
- `native.py`, `blocks_native.py`: both as lists for the C kernels of `ops/block_sparse`
- `reference.py`: the mask and the equations; `forms.py`: which form serves a call; `card.py`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from regard.core.checks import (
    check_flag,
    check_key_mask,
    check_qkv,
    check_scale,
    check_window,
    reject,
    words,
)
from regard.core.dispatch import choose
from regard.core.precision import cast_for_autocast, without_autocast
from regard.ops.window.forms import FORMS, Call
from regard.ops.window.halo import halo_attention
from regard.ops.window.reference import window_mask

__all__ = [
    "entropy_scale",
    "halo_attention",
    "inward_window_attention",
    "inward_window_mask",
    "window_attention",
    "window_mask",
]


def window_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    window: tuple[int, int] | Sequence[tuple[int, int]] = (-1, -1),
    grid: Sequence[int] | None = None,
    inward: bool = False,
    causal: bool = False,
    dilation: int | Sequence[int] = 1,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    tile: Sequence[int] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Every token attends to the tokens in a window around it, on a grid of any dimension.

        o_i = sum_j softmax_j(scale q_i . k_j) v_j

    over the keys j that on every axis lie at most `left` steps before and `right` steps behind
    the query, a step being `dilation` places. With `inward` the window is pushed inwards at the
    borders, so that every query sees equally many keys.

    Args:
        q, k, v: [B, H, T, D], [B, Hk, S, D], [B, Hk, S, Dv]; H a multiple of Hk.
        window: (left, right), the query's own place not counted, -1 unbounded: one pair for all
            axes, or one for each.
        grid: the sizes of the axes, in raster order (the last one is the fastest), with
            T = S = their product. None is a sequence; then T and S may differ, and the last
            query stands at the last key.
        causal: of a sequence (`grid=None`), nothing behind the query is seen.
        dilation: places in a step, one number or one for each axis; not with `inward`.
        scale: None is D ** -0.5; a number, a tensor [] or one per head [H].
        key_mask: bool [B, S], True = real key. A query whose window has no real key gives 0.
        tile: queries of a tile along each axis; changes results by rounding only.
        impl: "auto", "native" (CPU), "triton" (GPU: windows of a sequence), "eager" or
            "reference" (dense scores, differentiable twice).

    Precision: scores, weights and sums in float32 (float64 for float64 inputs).
    Cost: O(T w (D + Dv)) time for a window of w keys, times (1 + tile / width) per axis for
    keys that only some queries of a tile see. Memory: O((T + S)(D + Dv)) and 16 MB.
    Source: sliding windows as in Longformer and torch's varlen attention; `inward` is that of
    FreeSwim (arXiv 2511.14712), whose masks are matched exactly and whose outputs and gradients
    to 1e-5 and 1e-4.
    Limits: differentiable once.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 6 * 8, 16)
    >>> window_attention(q, k, v, grid=(6, 8), window=[(1, 1), (2, 2)], inward=True).shape
    torch.Size([1, 2, 48, 16])
    """
    op = "window_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(op, q, k, v)
    for name, flag in (("causal", causal), ("inward", inward)):
        check_flag(op, name, flag)
    check_scale(op, scale, sizes, q)
    check_key_mask(op, key_mask, sizes, q)
    shape = _grid(op, grid, sizes.T, sizes.S)
    axes = len(shape)
    windows = _windows(op, window, axes)
    if causal and grid is not None:
        raise reject(op, "causal", "False on a grid, which has no order of time", causal)
    if causal:
        windows = [(windows[0][0], 0)]
    steps = _per_axis(op, "dilation", dilation, axes)
    if max(steps) > 1:
        if inward:
            raise reject(op, "dilation", "1 with inward=True", dilation)
        if grid is None and sizes.T != sizes.S:
            raise reject(op, "dilation", "1 where T != S", dilation)
    cut = None if tile is None else _per_axis(op, "tile", tile, axes)
    if inward and grid is None and sizes.T != sizes.S:
        raise reject(op, "inward", "False where T != S", inward)
    call = Call(
        q, k, v, shape, tuple(windows), inward, causal, tuple(steps), scale, key_mask,
        None if cut is None else tuple(cut),
    )  # fmt: skip
    form = choose(op, FORMS, impl, call)
    with without_autocast(q):
        return form.run(call).to(q.dtype)


def inward_window_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    grid: Sequence[int],
    half: int | Sequence[int],
    *,
    time_half: int | None = None,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b n"] | None = None,
    tile: Sequence[int] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h n dv"]:
    """Windows of 2 half + 1 tokens a side that keep their size at the borders: FreeSwim's.

        o_i = sum_j softmax_j(scale q_i . k_j) v_j,
        |x'_j - clamp(x_i, half, n - 1 - half)| <= half on every axis of n > 2 half places

    Shapes: q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, Dv] -> [B, H, T, Dv], T = W, H W or
    F H W tokens in raster order for `grid` (W,), (H, W) or (F, H, W). `half` is a number or one
    for each axis; for three axes a number, or two, are those of H and W, and time is not
    windowed unless `time_half` says so. The other arguments are those of `window_attention`.

    Precision: float32 (float64 for float64 inputs) as `window_attention`.
    Cost: O(T prod(2 half + 1) (D + Dv)) time, O(T D) memory.
    Source: FreeSwim (arXiv 2511.14712): its masks are matched exactly, its outputs and gradients
    to 1e-5 and 1e-4.
    Limits: differentiable once.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 2 * 6 * 8, 16)
    >>> inward_window_attention(q, k, v, (2, 6, 8), (1, 2)).shape
    torch.Size([1, 2, 96, 16])
    """
    windows = _halves(grid, half, time_half)
    return window_attention(
        q, k, v, grid=grid, window=windows, inward=True, scale=scale, key_mask=key_mask,
        tile=tile, impl=impl,
    )  # fmt: skip


def inward_window_mask(
    grid: Sequence[int], half: int | Sequence[int], *, time_half: int | None = None
) -> Bool[Tensor, "n n"]:
    """The keys that every query of `inward_window_attention` sees, [N, N].

    >>> inward_window_mask((5,), 1).sum(1).tolist()
    [3, 3, 3, 3, 3]
    """
    return window_mask(grid, _halves(grid, half, time_half), inward=True)


def entropy_scale(head_size: int, trained: int, factor: float = 2.0) -> float:
    """The scale that keeps the entropy of weights where `factor` times as many keys are seen.

        sqrt(log(factor n) / log(n) / D),   n = `trained` keys

    FreeSwim's, with n the tokens of a frame in training.

    >>> round(entropy_scale(64, 1560) * 8, 4)
    1.0461
    """
    return math.sqrt(math.log(factor * trained) / math.log(trained) / head_size)


def _halves(
    grid: Sequence[int], half: int | Sequence[int], time_half: int | None
) -> list[tuple[int, int]]:
    axes = len(grid)
    values = [half] * axes if isinstance(half, int) else list(half)
    if axes == 3 and (isinstance(half, int) or len(values) == 2):
        values = [-1 if time_half is None else time_half, *values[-2:]]
    elif time_half is not None:
        raise ValueError(
            "inward_window_attention: time_half must be None unless grid has three axes and half "
            f"is for the last two, got {time_half}"
        )
    return [(value, value) for value in values]


def _grid(op: str, grid: Any, T: int, S: int) -> tuple[int, ...]:
    if grid is None:
        return (T,)
    if (
        not isinstance(grid, Sequence)
        or not grid
        or not all(isinstance(n, int) and n > 0 for n in grid)
    ):
        raise reject(op, "grid", "a sequence of positive integers", grid)
    if math.prod(grid) != T or T != S:
        raise reject(op, "grid", f"of {T} queries and {S} keys", words(str(tuple(grid))))
    return tuple(grid)


def _windows(op: str, window: Any, axes: int) -> list[tuple[int, int]]:
    pairs = isinstance(window, Sequence) and all(isinstance(pair, tuple) for pair in window)
    if pairs and len(window) != axes:
        raise reject(op, "window", f"(left, right), or {axes} of them", window)
    found: list[Any] = list(window) if pairs else [window] * axes
    for pair in found:
        check_window(op, pair)
    return found


def _per_axis(op: str, name: str, value: Any, axes: int) -> list[int]:
    values = [value] * axes if isinstance(value, int) else value
    fits = (
        isinstance(values, Sequence)
        and len(values) == axes
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in values)
    )
    if not fits:
        raise reject(op, name, f"a positive integer, or {axes} of them", value)
    return list(values)
