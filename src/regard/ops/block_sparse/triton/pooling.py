"""Keys and values at the coarser levels, as `pyramid.py` defines them, and what they weigh.

Rows of levels 2, 4 and 8 stand one after another. Nothing is computed where a plan pools nothing.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from regard.gpu.inside import head_of
from regard.ops.block_sparse.triton.tile import LOG2E, first_pooled_row, plan_head, rows_at


@triton.jit
def shares_of(bias, tokens, first, LEVEL: tl.constexpr, S, HAS_BIAS: tl.constexpr):
    """Shares [G, LEVEL] of the tokens of groups, and log2 of what the groups weigh [G]."""
    there = tokens < S
    if HAS_BIAS:
        b = tl.load(bias + tokens, mask=there, other=float("-inf")) * LOG2E
        top = tl.max(b, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        e = tl.exp2(b - top[:, None])
        total = tl.sum(e, 1)
        some = total > 0
        shares = e * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
        weight = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    else:
        count = tl.maximum(tl.minimum(S - first, LEVEL), 1).to(tl.float32)
        shares = there.to(tl.float32) / count[:, None]
        weight = tl.log2(count)
    return shares, weight


@triton.jit
def _means(
    x, target, shares, rows, known,
    G: tl.constexpr, LEVEL: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Stores the means of groups of LEVEL rows of x, a tile in registers."""
    channels = tl.arange(0, DP)
    mean = tl.sum(tl.reshape(x, [G, LEVEL, DP]) * shares[:, :, None], 1)
    tl.store(
        target + rows.to(tl.int64)[:, None] * D + channels[None, :],
        mean.to(target.dtype.element_ty), mask=known[:, None] & (channels < D)[None, :],
    )  # fmt: skip


@triton.jit
def _pool(
    x, y, bias, coarse_k, coarse_v, weights, tile, S, G: tl.constexpr, LEVEL: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The G rows of one level that a tile of keys x and values y has."""
    group = tile * G + tl.arange(0, G)
    first = group * LEVEL
    known = first < S
    tokens = first[:, None] + tl.arange(0, LEVEL)[None, :]
    shares, weight = shares_of(bias, tokens, first, LEVEL, S, HAS_BIAS)
    rows = first_pooled_row(LEVEL, S) + group
    if HAS_BIAS:
        tl.store(weights + rows, weight, mask=known)
    _means(x, coarse_k, shares, rows, known, G, LEVEL, D, DP)
    _means(y, coarse_v, shares, rows, known, G, LEVEL, E, EP)


@triton.jit
def _some(pooled, lists, CHUNK: tl.constexpr):
    """How many blocks of so many lists are pooled."""
    counts = tl.zeros([CHUNK], tl.int32)
    for start in tl.range(0, lists, CHUNK):
        x = start + tl.arange(0, CHUNK)
        counts += tl.load(pooled + x, mask=x < lists, other=0)
    return tl.sum(counts, 0)


@triton.jit(do_not_specialize=["S", "tiles", "queries"])
def pooling_kernel(
    k, v, bias, pooled, coarse_k, coarse_v, weights,
    kb, kh, kt, vb, vh, vt, S, tiles, queries,
    H: tl.constexpr, HK: tl.constexpr, SHARE: tl.constexpr, PH: tl.constexpr,
    MEMBERS: tl.constexpr, BIAS_HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    DP: tl.constexpr, EP: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Means of the groups of TILES N tokens: coarse_k [B HK, R, D], coarse_v, weights [B HB, R].

    Nothing where no list of the key head has a pooled block.
    """
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b = (pair // HK).to(tl.int64)
    h = pair % HK
    GROUP: tl.constexpr = H // HK
    of_plan = plan_head(b, h * GROUP, h, SHARE, PH, H, HK) * queries
    if _some(pooled + of_plan, queries * (GROUP // MEMBERS), CHUNK) == 0:
        return
    k += b * kb + h * kh
    v += b * vb + h * vh
    count = tl.cdiv(S, 2) + tl.cdiv(S, 4) + tl.cdiv(S, 8)
    coarse_k += pair.to(tl.int64) * count * D
    coarse_v += pair.to(tl.int64) * count * E
    of_bias = head_of(pair, HK, BIAS_HEADS).to(tl.int64)
    if HAS_BIAS:
        bias += of_bias * S
        weights += of_bias * count
    for one in tl.range(tile * TILES, tl.minimum((tile + 1) * TILES, tl.cdiv(S, N))):
        token = one * N + tl.arange(0, N)
        x = rows_at(k, token.to(tl.int64) * kt, token < S, D, DP).to(tl.float32)
        y = rows_at(v, token.to(tl.int64) * vt, token < S, E, EP).to(tl.float32)
        for power in tl.static_range(1, 4):
            _pool(
                x, y, bias, coarse_k, coarse_v, weights, one, S, N // (1 << power), 1 << power,
                D, DP, E, EP, HAS_BIAS,
            )  # fmt: skip
