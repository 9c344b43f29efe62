"""Chunks of keys are scored for blocks of queries, and a budget of tokens is taken from the best.

A chunk is [boundaries[m], boundaries[m + 1]); equal boundaries are a chunk without tokens, with
which rows of a batch are filled up to one number of chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard.core.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_qkv,
    check_window,
    reject,
)
from regard.core.precision import compute_dtype

POOLINGS = ("mean", "max")


def fixed_chunks(length: int, chunk: int, device: torch.device) -> Int[Tensor, "1 m"]:
    """Boundaries every `chunk` tokens: [1, ceil(length / chunk) + 1].

    >>> fixed_chunks(10, 4, torch.device("cpu"))
    tensor([[ 0,  4,  8, 10]])
    """
    chunks = -(-length // chunk)
    return (torch.arange(chunks + 1, device=device) * chunk).clamp(max=length)[None]


def chunk_scores(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    boundaries: Int[Tensor, "#b m"],
    *,
    block: int,
    normalise: bool = True,
    pooling: str = "mean",
    per_head: bool = False,
    instruction: int = 0,
) -> Float[Tensor, "b h n m"]:
    """How much a block of queries has in common with each chunk of keys.

        s_im = r_i . c_m,   c_m = (sum of the keys of chunk m) / sqrt(its length),
        r_i = (mean of the queries of block i) sqrt(its length)

    for queries and keys averaged over their heads. Divided by sqrt(n) noise weighs the same in
    chunks of any length, where a plain mean would prefer short ones.

    Args:
        q, k: [B, H, T, D], [B, Hk, S, D].
        boundaries: [1 or B, M + 1], integers from 0 to S, not decreasing.
        block: queries in a block; the last one is filled up with zeros.
        normalise: False: means of both, without the roots.
        pooling: of queries; "max" takes the largest of every channel, without a root.
        per_head: scores of every query head [B, H, n, M] instead of [B, 1, n, M].
        instruction: the last queries, which belong to no block.

    Precision: float32 (float64 for float64 inputs); sums of chunks in float64.
    Cost: O(T M D / block), and O(S D).
    Source: DHSA, arXiv 2510.24606, 2025.
    """
    op = "chunk_scores"
    sizes = check_qkv(op, q, k, k)
    check_boundaries(op, boundaries, sizes.B, q)
    check_integer(op, "block", block)
    check_flag(op, "normalise", normalise)
    check_choice(op, "pooling", pooling, POOLINGS)
    check_flag(op, "per_head", per_head)
    check_integer(op, "instruction", instruction, least=0)
    dtype = compute_dtype(q.dtype)
    queries, keys = (x.to(dtype) for x in (q[:, :, : max(sizes.T - instruction, 0)], k))
    if per_head:
        keys = keys.repeat_interleave(sizes.group, 1)
    else:
        queries, keys = (x if x.shape[1] == 1 else x.mean(1, keepdim=True) for x in (queries, keys))
    n = queries.shape[2]
    blocks = -(-n // block)
    real = torch.full((blocks, 1), float(block), dtype=dtype, device=q.device)
    if n % block:
        real[-1] = n % block
    missing = blocks * block - n
    if pooling == "max":
        rows = pad(queries, (0, 0, 0, missing), value=-torch.inf).unflatten(2, (blocks, block))
        rows = rows.amax(3)
    else:
        rows = pad(queries, (0, 0, 0, missing)).unflatten(2, (blocks, block)).mean(3)
        rows = rows * real.sqrt() if normalise else rows
    if not sizes.S:
        keys = pad(keys, (0, 0, 0, 1))
    ends = boundaries.long()[:, None, None].expand(*keys.shape[:2], keys.shape[3], -1)
    # Along rows of memory: six times as fast as down its columns.
    upto = keys.mT.to(torch.float64, memory_format=torch.contiguous_format).cumsum(3)
    sums = upto.gather(3, (ends - 1).clamp(min=0)).masked_fill_(ends == 0, 0.0).diff(dim=3).mT
    lengths = boundaries.long().diff(dim=1)[:, None, :, None]
    weights = lengths.clamp(min=1).double()
    means = sums / (weights.sqrt() if normalise else weights)
    scores = rows @ means.to(dtype).mT
    return scores.masked_fill(lengths.mT == 0, -torch.inf)


def select_tokens(
    scores: Float[Tensor, "b h n m"],
    boundaries: Int[Tensor, "#b m1"],
    *,
    queries: int,
    keys: int,
    block: int,
    budget: int,
    local: int = 0,
    global_: int = 0,
    window: tuple[int, int] | None = None,
    causal: bool = True,
    compat: str | None = None,
) -> Int[Tensor, "b h n budget"]:
    """Indices of the keys that each block of queries attends to: `budget` of them, ascending.

    A token has the score of its chunk. Allowed are the tokens up to the end of the query block
    (`causal`) and not more than `window[0]` before its first query. The last `local` of them are
    taken in any case, and the first `global_` replace the first of the list; the rest is filled
    by falling score. Of the last chunk that is taken, the latest tokens are.

    Args:
        scores: [B, 1 | Hk | H, n, M], of `chunk_scores`.
        boundaries: those of `chunk_scores`.
        queries, keys: T and S, all of them; queries are aligned with the end of the keys.
        block, budget: queries in a block, keys per block of queries.
        window: (left, right), as of the attention.
        compat: "official": `left` counts from the end of the block, though its first queries see
            further back, and bounds the budget.

    Returns: int64, -1 behind the tokens of a block that is allowed fewer.

    Cost: O(n (M log M + budget)).
    Source: DHSA, arXiv 2510.24606, 2025. The authors take any part of the chunk that is cut
        (the order of a sort); else the choices are theirs.
    """
    op = "select_tokens"
    for name, value in {"block": block, "budget": budget}.items():
        check_integer(op, name, value)
    for name, value in {
        "queries": queries,
        "keys": keys,
        "local": local,
        "global_": global_,
    }.items():
        check_integer(op, name, value, least=0)
    check_flag(op, "causal", causal)
    left = tokens_back(op, window, causal)
    if compat is not None:
        check_choice(op, "compat", compat, ("official",))
    if left is not None and compat is None:
        left += block
    check_boundaries(op, boundaries, len(scores), scores)
    device, offset = scores.device, keys - queries
    budget = min(budget, keys) if left is None else min(budget, left, keys)
    end = (torch.arange(scores.shape[2], device=device) + 1) * block + offset
    start = torch.zeros_like(end) if left is None else (end - left).clamp(min=0)
    end = end.clamp(0, keys)
    if not causal:
        end = torch.full_like(end, keys)
    allowed = (end - start).clamp(min=0)
    near = allowed.clamp(max=min(local, budget))
    free = torch.minimum(budget - near, allowed - near)
    # What each chunk has to give, [1 or B, 1, n, M], and in which order they are asked.
    last = (end - near)[:, None]
    bounds = boundaries.long()[:, None, None]
    high = torch.minimum(bounds[..., 1:], last)
    there = (high - torch.maximum(bounds[..., :-1], start[:, None])).clamp(min=0)
    there = there.expand(*scores.shape[:3], -1)
    order = scores.flip(3).argsort(dim=3, descending=True, stable=True)
    order = scores.shape[3] - 1 - order
    asked = there.gather(3, order)
    before = asked.cumsum(3) - asked
    given = torch.minimum((free[:, None] - before).clamp(min=0), asked)
    taken = torch.zeros_like(there).scatter(3, order, given)
    first = high.expand_as(taken) - taken
    # One more range, the local tokens; then slot s of the list lies in the range where it falls.
    shape = (*taken.shape[:3], 1)
    taken = torch.cat([taken, near[:, None].expand(shape)], 3)
    first = torch.cat([first, last.expand(shape)], 3)
    until = taken.cumsum(3)
    slots = torch.arange(budget, device=device).expand(*shape[:3], -1).contiguous()
    place = torch.searchsorted(until, slots, right=True)
    inside = place < taken.shape[3]
    place = place.clamp(max=taken.shape[3] - 1)
    found = (first - until + taken).gather(3, place) + slots
    found = torch.where(inside, found, -1)
    if global_ and budget:
        count = min(global_, budget)
        early = start[:, None] + torch.arange(count, device=device)
        early = torch.minimum(early, end[:, None] - 1).clamp(min=-1)
        found[..., :count] = early
    return found


def tokens_back(op: str, window: Any, causal: bool) -> int | None:
    """The left side of a window, None without bound; only for causal attention."""
    check_window(op, window)
    if window is not None and not causal:
        raise reject(op, "window", "None without causal", window)
    return None if window is None or window[0] < 0 else window[0]


def check_boundaries(op: str, boundaries: Any, B: int, like: Tensor) -> None:
    """Metadata only."""
    integers = (torch.int32, torch.int64)
    if not isinstance(boundaries, Tensor) or boundaries.dtype not in integers:
        raise reject(op, "boundaries", "a tensor of int32 or int64", boundaries, kind=TypeError)
    fits = boundaries.dim() == 2 and boundaries.shape[0] in (1, B) and boundaries.shape[1] > 0
    if not fits or boundaries.device != like.device:
        raise reject(op, "boundaries", f"[1 or {B}, chunks + 1] on {like.device}", boundaries)
