"""How much a block of queries cares for a block of keys, estimated at a fraction of the cost.

- sampled: the same few offsets of every block, maxima of their scores
- antidiagonal: groups of `stride` tokens scored along their antidiagonals, a softmax, sums
- means: the scores of mean queries and mean keys
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.precision import compute_dtype
from regard.ops.local_linear import gemm

_SCORES = 1 << 21  # numbers held at a time: what a cache holds, and
_SCORES_GPU = 1 << 25  # what keeps a GPU busy
_ROWS = 64  # sampled sequences are filled up to a multiple of this by the released code


def sampled_importance(
    q: Tensor,
    k: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    seen: Tensor | None = None,
) -> Tensor:
    """Maxima of the scores of sampled tokens, against the best of each row; rows sum to 1.

        m_a = max_c s_ac,   R_aj = exp(max_{c in j} s_ac - m_a),   P_ij ~ max_{a in i} R_aj

    q [B, H, T, D], k [B, Hk, S, D]; offsets [B or 1, H or Hk or 1, n] within a block, taken from
    every block; seen: bool [nq, nk], blocks that count. -> [B, H, nq, nk]. The released code
    fills the sampled sequences up to 64 rows with the last one, and what lies there counts in
    the sum of a row; so it does here without `seen`.
    """
    nq, nk = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    queries = _sampled(q, offsets_q, block_q)
    keys = _sampled(k, offsets_k, block_k)
    per_q, per_k = offsets_q.shape[-1], offsets_k.shape[-1]
    if seen is None:
        queries, keys = _filled(queries, per_q), _filled(keys, per_k)
    keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1) * scale
    found = queries.new_empty(*q.shape[:2], queries.shape[2] // per_q, keys.shape[2] // per_k)
    for heads, rows in _pieces(queries, keys.shape[2], per_q):
        scores = _products(queries.flatten(0, 1)[heads, rows], keys.flatten(0, 1)[heads])
        best = scores.unflatten(2, (-1, per_k)).amax(3)
        own = slice(rows.start // per_q, rows.stop // per_q)
        if seen is not None:
            best.masked_fill_(~seen[own].repeat_interleave(per_q, 0), -torch.inf)
        top = best.amax(2, keepdim=True)
        best = (best - torch.where(top == -torch.inf, 0.0, top)).exp_()
        found.flatten(0, 1)[heads, own] = best.unflatten(1, (-1, per_q)).amax(2)
    total = found.sum(3, keepdim=True)
    return (found / torch.where(total == 0, 1.0, total))[:, :, :nq, :nk]


def draw_offsets(
    block: int, count: int, shape: tuple[int, int], generator: torch.Generator | None, like: Tensor
) -> Tensor:
    """`count` of the offsets 0 .. block - 1, [*shape, count]: random, or evenly spread."""
    if generator is None:
        even = (torch.arange(count, device=like.device) * block + block // 2) // count
        return even.expand(*shape, count)
    noise = torch.rand(*shape, block, generator=generator, device=generator.device)
    return noise.topk(count, 2).indices.to(like.device)


def antidiagonal_importance(
    q: Tensor, k: Tensor, *, block_q: int, block_k: int, stride: int, scale: float, causal: bool
) -> Tensor:
    """Mass of every block under a softmax of scores taken along antidiagonals.

        a_uc = sum_e q_{u g + g - 1 - e} . k_{c g + e} scale / g,   P_ij = sum of softmax_c(a)_uc

    over the groups u of block i and c of block j. Causal: a group sees the groups up to its own.
    q [B, H, T, D], k [B, Hk, S, D] -> [B, H, nq, nk]. Tokens that a last group lacks are zero.
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    nq, nk = -(-T // block_q), -(-S // block_k)
    rows, columns = -(-T // stride), -(-S // stride)
    dtype = compute_dtype(q.dtype)
    queries, keys = (
        torch.cat([x, x.new_zeros(*x.shape[:2], -x.shape[2] % block, D)], 2).to(dtype)
        for x, block in ((q, block_q), (k, block_k))
    )
    queries = queries.unflatten(2, (-1, stride)).flip(3).flatten(3)[:, :, :rows]
    keys = keys.unflatten(2, (-1, stride)).flatten(3)[:, :, :columns]
    keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1) * (scale / stride)
    found = queries.new_zeros(*q.shape[:2], nq, nk)
    per_q, per_k = block_q // stride, block_k // stride
    group = torch.arange(columns, device=q.device)
    for heads, part in _pieces(queries, columns, per_q):
        scores = _products(queries.flatten(0, 1)[heads, part], keys.flatten(0, 1)[heads])
        if causal:
            own = part.start + torch.arange(scores.shape[1], device=q.device)
            own = own + (S - T) // stride
            scores.masked_fill_(group > own[:, None], -torch.inf)
        weights = torch.softmax(scores, 2).nan_to_num_(0.0)
        weights = pad(weights, (0, nk * per_k - columns, 0, -weights.shape[1] % per_q))
        cells = weights.unflatten(2, (nk, per_k)).sum(3).unflatten(1, (-1, per_q)).sum(2)
        own = slice(part.start // per_q, part.start // per_q + cells.shape[1])
        found.flatten(0, 1)[heads, own] = cells
    return found


def mean_importance(
    q: Tensor, k: Tensor, *, block_q: int, block_k: int, scale: float, seen: Tensor | None = None
) -> Tensor:
    """The softmax over blocks of the scores between mean queries and mean keys, [B, H, nq, nk]."""
    queries, keys = _means(q, block_q), _means(k, block_k)
    scores = queries @ keys.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, 3).nan_to_num(0.0)


def _means(x: Tensor, block: int) -> Tensor:
    length = x.shape[2]
    blocks = -(-length // block)
    padded = x.new_zeros(*x.shape[:2], blocks * block, x.shape[3], dtype=compute_dtype(x.dtype))
    padded[:, :, :length] = x
    start = torch.arange(blocks, device=x.device) * block
    counts = (length - start).clamp(max=block)
    return padded.unflatten(2, (blocks, block)).sum(3) / counts[:, None]


def _pieces(queries: Tensor, columns: int, per_block: int) -> Iterator[tuple[slice, slice]]:
    """Heads, of all batch rows, and rows, in whole blocks, whose scores are held at a time."""
    heads, rows = queries.shape[0] * queries.shape[1], queries.shape[2]
    most = (_SCORES if queries.device.type == "cpu" else _SCORES_GPU) // max(1, columns)
    step = max(1, most // per_block) * per_block
    together = max(1, most // max(1, rows))
    for first in range(0, heads, together):
        for start in range(0, rows, step):
            yield slice(first, min(first + together, heads)), slice(start, min(start + step, rows))


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """rows keys^T of some heads; no gradient passes through an estimate."""
    alone = len(rows) == 1 and not torch.is_grad_enabled()
    if alone and gemm.serves(rows, rows.dtype, rows.shape[1], keys.shape[1]):
        return gemm.times(rows[0], keys[0])[None]
    return rows @ keys.mT


def _sampled(x: Tensor, offsets: Tensor, block: int) -> Tensor:
    """The tokens at these offsets of every block; what lies behind the last is the last."""
    blocks = -(-x.shape[2] // block)
    start = torch.arange(blocks, device=x.device) * block
    tokens = (start[:, None] + offsets[..., None, :]).clamp(max=x.shape[2] - 1).flatten(2)
    tokens = tokens.expand(*x.shape[:2], -1)
    return x.to(compute_dtype(x.dtype)).gather(2, tokens[..., None].expand(-1, -1, -1, x.shape[3]))


def _filled(x: Tensor, per_block: int) -> Tensor:
    missing = -x.shape[2] % math.lcm(_ROWS, per_block)
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2) if missing else x
