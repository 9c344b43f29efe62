"""Which blocks of keys a query attends to: scores of block means, summed over a group of heads.

Positions are counted in real keys: `Places` says for every query how many it sees. Without a
mask these are one row of numbers for the whole batch; with one the keys are packed to the front.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.core.cache import KVCache
from regard.core.precision import compute_dtype

HELD = 1 << 19  # scores held at a time


class Places(NamedTuple):
    """seen: real keys that a query sees, [1 or B, T]. order: packed place -> key, [B, S]."""

    seen: Tensor
    order: Tensor | None


def places(T: int, S: int, key_mask: Tensor | None, device: torch.device) -> Places:
    """Of T queries that are aligned with the end of S keys."""
    before = (torch.arange(T, device=device) + (S - T + 1)).clamp(min=0)
    if key_mask is None:
        return Places(before[None], None)
    counts = torch.cat([key_mask.new_zeros(len(key_mask), 1, dtype=torch.long),
                        key_mask.cumsum(1)], 1)  # fmt: skip
    order = torch.argsort(key_mask.logical_not().byte(), dim=1, stable=True)
    return Places(counts.index_select(1, before), order)


def block_means(k: Tensor, block: int) -> Tensor:
    """Means of the complete blocks [B, Hk, S // block, D], in float32 at least."""
    whole = k.shape[2] // block
    blocks = k[:, :, : whole * block].unflatten(2, (whole, block))
    return blocks.mean(3, dtype=compute_dtype(k.dtype))


def group_blocks(k: Tensor, order: Tensor, key_mask: Tensor, block: int) -> Tensor:
    """The means where only real keys count: what is masked is cleared and packed to the end."""
    k = torch.where(key_mask[:, None, :, None], k, 0.0)
    packed = k.gather(2, order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    return block_means(packed, block)


# Means of the complete blocks of a cache, beside its buffers: they follow from what is written
# there, which never changes, so a decoding step only averages a block that it has completed.
_KEPT: WeakKeyDictionary[object, dict[int, Tensor]] = WeakKeyDictionary()


def cached_means(cache: KVCache, block: int) -> Tensor:
    """`block_means(cache.k, block)`, of which all but the newest were computed before."""
    buffers, whole = cache._buffers, cache.length // block
    kept = _KEPT.setdefault(buffers, {}).get(block)
    done = 0 if kept is None else kept.shape[2]
    if kept is None or kept.is_inference() != torch.is_inference_mode_enabled():
        kept, done = block_means(cache.k, block), whole
    elif done < whole:
        new = block_means(cache.k[:, :, done * block : whole * block], block)
        kept = torch.cat([kept, new], 2)
    _KEPT[buffers][block] = kept
    return kept[:, :, :whole]


def choose_blocks(q: Tensor, means: Tensor, seen: Tensor, block: int, count: int) -> Tensor:
    """The `count` most important blocks of every query, -1 where there are fewer.

    q (scaled): [B, H, T, D]; means [B, Hk, n, D]; seen [1 or B, T]. Returns [B, Hk, T, count'],
    count' <= count and at most as many as there are blocks, in falling importance.
    """
    (B, H, T, _), (Hk, complete) = q.shape, means.shape[1:3]
    # One more column than complete blocks: the block in which the last query may stand.
    columns = complete + 1
    count = min(count, columns)
    if not (B and H and T):
        return seen.new_full((B, Hk, T, count), -1)
    queries = q.to(means.dtype).unflatten(1, (Hk, H // Hk))
    step = max(1, HELD // (B * H * columns))
    parts = [
        _choose(queries[:, :, :, t : t + step], means, seen[:, t : t + step], block, count)
        for t in range(0, T, step)
    ]
    return torch.cat(parts, 2)


def _choose(q: Tensor, means: Tensor, seen: Tensor, block: int, count: int) -> Tensor:
    """[B, Hk, G, t, D] against [B, Hk, n, D]."""
    n = torch.arange(means.shape[2], device=q.device)
    complete = (seen // block)[:, None, :, None]  # [1 or B, 1, t, 1]
    current = ((seen - 1) // block)[:, None, :, None]  # -1 where no key is seen
    scores = torch.matmul(q, means.mT[:, :, None])
    scores = scores.masked_fill(n >= complete[:, :, None], -torch.inf)
    share = scores.softmax(4).sum(2)
    share = pad(share, (0, 1))  # an incomplete last block
    n = torch.arange(share.shape[3], device=q.device)
    share = share.masked_fill(n > current, -torch.inf).masked_fill(n == current, torch.inf)
    best = share.topk(count, 3)
    return best.indices.masked_fill(best.values == -torch.inf, -1)


def tokens_of(selected: Tensor, order: Tensor, block: int, key_mask: Tensor) -> Tensor:
    """Blocks of packed keys as single keys where they really are, [B, Hk, T, n block].

    Masked keys, which fill the last block, are left out: which ones they are depends on how many
    real keys come later.
    """
    S = order.shape[1]
    if not S:
        return selected  # all -1
    packed = selected[..., None] * block + torch.arange(block, device=order.device)
    real = key_mask.sum(1).view(-1, 1, 1, 1, 1)
    there = ((selected[..., None] >= 0) & (packed < real)).flatten(3)
    packed = torch.where(there, packed.flatten(3), 0)
    keys = order.gather(1, packed.flatten(1)).view(packed.shape)
    return torch.where(there, keys, -1)
