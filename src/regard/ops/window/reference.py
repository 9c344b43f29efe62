"""The equations of attention within windows of a grid, with a dense mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def window_mask(
    grid: Sequence[int], window: Sequence[tuple[int, int]], *, inward: bool = False,
    dilation: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """bool [N, N]: whether query i sees key j, tokens in raster order, the last axis fastest.

    On each axis of size n, with (l, r) its window and d its dilation (1 if not given), a query at
    x sees x' if x' - x is a multiple of d and

        x - l d <= x' <= x + r d                                                   (-1: no bound)

    With `inward` (d = 1): x - l - max(0, x + r - n + 1) <= x' <= x + r + max(0, l - x).

    >>> window_mask((4,), [(1, 1)], inward=True).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    """
    seen = torch.ones(1, 1, dtype=torch.bool)
    steps = [1] * len(grid) if dilation is None else dilation
    for n, (left, right), step in zip(grid, window, steps, strict=True):
        own = torch.zeros(n, n, dtype=torch.bool)
        for x in range(n):
            low = -1 if left < 0 else x - left * step
            high = n if right < 0 else x + right * step
            if inward and left >= 0 and right >= 0:
                low, high = low - max(0, x + right - n + 1), high + max(0, left - x)
            place = torch.arange(n)
            own[x] = (low <= place) & (place <= high) & ((place - x) % step == 0)
        seen = (seen[:, None, :, None] & own[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return seen


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int, int] | Sequence[tuple[int, int]] = (-1, -1),
    grid: Sequence[int] | None = None,
    inward: bool = False,
    causal: bool = False,
    dilation: int | Sequence[int] = 1,
    scale: float | Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """o_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys in the window. In float64."""
    (B, H, T, D), (_, Hk, S, _) = q.shape, k.shape
    sizes = (S,) if grid is None else tuple(grid)
    windows: list[tuple[int, int]] = []
    for pair in [window] if isinstance(window[0], int) else window:
        windows.append((int(pair[0]), int(pair[1])))  # type: ignore[index, arg-type]
    windows = windows * len(sizes) if len(windows) == 1 else windows
    steps: list[int] = [dilation] * len(sizes) if isinstance(dilation, int) else list(dilation)
    seen = window_mask(sizes, windows, inward=inward, dilation=steps).to(q.device)
    if causal:
        seen = seen.tril()
    if T != S:  # the last query stands at the last key
        position = torch.arange(T)[:, None] + S - T
        key = torch.arange(S)
        (left, right), step = windows[0], steps[0]
        seen = (key - position) % step == 0
        seen &= (left < 0) | (key >= position - left * step)
        seen &= (right < 0) | (key <= position + right * step)
        seen = seen & (key <= position) if causal else seen
        seen = seen.to(q.device)
    real = k.new_ones(B, S, dtype=torch.bool) if key_mask is None else key_mask
    keys, values = (
        torch.where(real[:, None, :, None], x, 0.0).double().repeat_interleave(H // Hk, 1)
        for x in (k, v)
    )
    factor = torch.as_tensor(D**-0.5 if scale is None else scale, dtype=torch.float64)
    scores = q.double() * factor.to(q.device).reshape(-1, 1, 1) @ keys.mT
    seen = seen & real[:, None, None]
    scores = torch.where(seen, scores, -torch.inf)
    top = scores.detach().amax(3, keepdim=True) if S else scores.new_zeros(())
    weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top))
    sums = weights.sum(3, keepdim=True)
    return ((weights / torch.where(sums == 0, 1.0, sums)) @ values).to(q.dtype)
