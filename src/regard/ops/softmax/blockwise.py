"""Softmax attention in blocks of queries, in plain differentiable torch operations.

Each block of queries meets the keys that its rows can see at all, so that nothing of the size
T x S exists at a time. A score that a row does not see is *replaced*, never added to, and its
weight is replaced again after the exponential: so whatever its key and value hold, neither the
output nor a gradient of any order can meet it (0 times infinity would be NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.precision import compute_dtype
from regard.core.visibility import Tile
from regard.ops.softmax.call import Problem

# Scores of one block. About eight tensors of that size live at once: 16 MB in float32, which
# caches hold. A GPU wants larger blocks to be busy, up to half of T x S.
SCORES = 1 << 19
MOST_ON_GPU = 1 << 23
FEWEST_ROWS = 16


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, Dv] and log-sum-exp of the keys' scores [B, H, T]."""
    dtype = compute_dtype(problem.q.dtype)
    q, k, v = (tensor.to(dtype) for tensor in (problem.q, problem.k, problem.v))
    scale = problem.scale
    q = q * (scale.to(dtype).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale)
    T = q.shape[2]
    rows = problem.block_size or _rows_per_block(q, k.shape[2])
    outputs, sums = [], []
    # From the last block, the widest when causal, to the first: each fits into the memory that
    # the one before gave back. Widths that grow would leave a trail of holes behind them.
    for start in reversed(range(0, max(T, 1), rows)):
        stop = min(start + rows, T)
        first, last = problem.sees.key_range(start, stop)
        tile = problem.sees.tile((start, stop), (first, last), dtype)
        block = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        out, lse = _attend_block(*block, tile, problem.softcap)
        outputs.append(out)
        sums.append(lse)
    out, lse = torch.cat(outputs[::-1], 2), torch.cat(sums[::-1], 2)
    if problem.sinks is not None:
        # A sink of logit c keeps the share e^lse / (e^lse + e^c) of the output.
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        out = out * torch.sigmoid(finite - problem.sinks.to(dtype)[:, None])[..., None]
    return out.to(problem.q.dtype), lse


def _rows_per_block(q: Tensor, keys: int) -> int:
    B, H, T, _ = q.shape
    scores = SCORES
    if q.device.type != "cpu":
        scores = max(scores, min(MOST_ON_GPU, T * keys // 2))
    return max(FEWEST_ROWS, scores // max(B * H * keys, 1))


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, softcap: float | None
) -> tuple[Tensor, Tensor]:
    hidden = None if tile.mask is None else ~tile.mask
    scores = _per_group(q, k.mT)
    if softcap is not None:
        if hidden is not None:  # an overflow here would be NaN in the derivative of tanh
            scores = scores.masked_fill(hidden, 0.0)
        scores = softcap * torch.tanh(scores / softcap)
    if tile.bias is not None:
        scores = scores + tile.bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    # The shift cancels exactly, so it needs no derivative; a row without keys is not shifted.
    shift = scores.detach().amax(-1, keepdim=True) if k.shape[2] else scores.new_zeros(())
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    weights = torch.exp(scores - shift)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0.0)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (shift + total.log()).masked_fill(empty, -torch.inf)
    return _per_group(weights, v) / total, lse.squeeze(-1)


def _per_group(x: Tensor, y: Tensor) -> Tensor:
    """x [B, H, n, m] times y [B, Hk, m, c]: the query heads of a group share one product."""
    B, H, n, m = x.shape
    Hk, c = y.shape[1], y.shape[3]
    return (x.reshape(B, Hk, H // Hk * n, m) @ y).reshape(B, H, n, c)
