"""The whole policy: from queries and keys to a map of levels."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.core.checks import (
    Sizes,
    check_choice,
    check_flag,
    check_integer,
    check_qkv,
    check_scale,
    check_shape,
    reject,
)
from regard.core.precision import cast_for_autocast, without_autocast
from regard.ops.pyramid_sparse import assignment
from regard.ops.pyramid_sparse.importance import (
    antidiagonal_importance,
    draw_offsets,
    mean_importance,
    sampled_importance,
)
from regard.ops.pyramid_sparse.similarity import similarity_caps as caps_of

MODES = ("topk", "thresholdbound", "energybound")
IMPORTANCES = ("sampled", "antidiagonal", "means")
Ends = Mapping[int, float | tuple[float, float]]


def pyramid_levels(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    *,
    ratios: Ends,
    mode: str = "topk",
    importance: str | Float[Tensor, "b h nq nk"] = "sampled",
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    scale: float | None = None,
    similarity_caps: tuple[float, float, float] | None = None,
    protected_blocks: int = 0,
    sampling: int = 4,
    stride: int = 8,
    tile: int | None = None,
    generator: torch.Generator | None = None,
    compat: str | None = None,
) -> Int[Tensor, "b h nq nk"]:
    """How finely every block of queries attends to every block of keys, from what they hold.

        levels = min(assign(P, ratios), caps),   P_ij = importance of key block j to query block i

    Args:
        q, k: [B, H, T, D], [B, Hk, S, D]; H a multiple of Hk.
        ratios: level -> end of its share, or (start, end), of which the end counts:
            {1: .1, 2: .15, 4: .15, 8: .35, 0: 1.} gives the best 10 % of blocks level 1, the
            next 5 % level 2, the next 20 % level 8, and skips the rest.
        mode: what is shared out. "topk": ranks, so that all rows cost the same; "thresholdbound":
            cumulative importance, the first level at least 6 % of the blocks (not causal);
            "energybound": cumulative importance.
        importance: an estimate, or P itself. "sampled": maxima of the scores of every
            `sampling`-th token against the best of their row; "antidiagonal": a softmax of the
            scores of groups of `stride` tokens; "means": of mean queries and mean keys.
        causal: ranks and shares are among the blocks that a row sees; the blocks that hold a
            query's own position and the first block are level 1, all later ones level 0.
        scale: None is D ** -0.5.
        similarity_caps: a block of keys is pooled by l = 2, 4, 8 only if the cosine of the first
            and last keys of its groups exceeds, on average, the threshold for l.
        protected_blocks: so many last blocks of keys (text behind a video) get level 1, and with
            `causal` so many last blocks of queries see all of their past at level 1.
        tile: tokens that a tile of the released kernels holds, 32: levels get multiples of the
            blocks that fill one, as released. Nothing here needs it.
        generator: draws the sampled offsets, per sequence and head; None spreads them evenly.
        compat: "official" keeps what the released code does where it loses: no block of level 1
            in rows of few blocks, a coarse level for a block that dominates its row
            ("energybound").

    Returns:
        int8 [B, H, ceil(T / block_q), ceil(S / block_k)], for `pyramid_attention`. No gradient.

    Precision: importance in float32 (float64 for float64 inputs).
    Cost: O(T S D / sampling**2), O(T S D / stride) or O(T S D / (block_q block_k)) time; 8 MB of
    scores are held at a time.
    Source: Pyramid Sparse Attention, arXiv 2512.04025, whose importance is matched to 1e-5 and
    whose levels exactly; the antidiagonal estimate is XAttention's. Evenly spread offsets,
    "means", T != S and grouped queries are ours.
    Limits: blocks of equal importance rank by their position. With random offsets or `causal` in
    other sizes than T = S the released code has no counterpart.
    Raises: TypeError, ValueError naming the argument.

    >>> import torch
    >>> q, k = torch.randn(2, 1, 2, 512, 16)
    >>> levels = pyramid_levels(q, k, ratios={1: 0.25, 4: 0.5, 0: 1.0}, block_q=64, block_k=64)
    >>> levels.shape, sorted(levels[0, 0, 0].tolist())
    (torch.Size([1, 2, 8, 8]), [0, 0, 0, 0, 1, 1, 4, 4])
    """
    op = "pyramid_levels"
    q, k = cast_for_autocast(q, k)
    sizes = check_qkv(op, q, k, k)
    for name, size in (("block_q", block_q), ("block_k", block_k), ("sampling", sampling)):
        check_integer(op, name, size)
    check_integer(op, "stride", stride)
    check_integer(op, "protected_blocks", protected_blocks, least=0)
    check_flag(op, "causal", causal)
    check_choice(op, "mode", mode, MODES)
    if isinstance(scale, Tensor):
        raise reject(op, "scale", "None or a number", scale, kind=TypeError)
    check_scale(op, scale, sizes, q)
    if compat is not None:
        check_choice(op, "compat", compat, ("official",))
    if tile is not None:
        check_integer(op, "tile", tile)
        if causal or mode == "energybound":
            raise reject(op, "tile", 'None where causal or of mode "energybound"', tile)
    if causal and mode == "thresholdbound":
        raise reject(op, "mode", "'topk' or 'energybound' where causal", mode)
    ends = check_ratios(op, ratios, block_k)
    if similarity_caps is not None and (
        not isinstance(similarity_caps, tuple) or len(similarity_caps) != 3
    ):
        raise reject(op, "similarity_caps", "three thresholds", similarity_caps, kind=TypeError)
    if importance is not None and isinstance(importance, Tensor):
        shape = -(-sizes.T // block_q), -(-sizes.S // block_k)
        check_shape(op, "importance", importance, (sizes.B, sizes.H, *shape), q)
    else:
        check_choice(op, "importance", importance, IMPORTANCES)
        if importance == "antidiagonal" and (block_q % stride or block_k % stride):
            raise reject(op, "stride", f"a divisor of {block_q} and {block_k}", stride)
        if importance == "sampled" and sampling > min(block_q, block_k):
            raise reject(op, "sampling", "at most the size of a block", sampling)
    with torch.no_grad(), without_autocast(q):
        if not sizes.T or not sizes.S:
            shape = sizes.B, sizes.H, -(-sizes.T // block_q), -(-sizes.S // block_k)
            return torch.ones(shape, dtype=torch.int8, device=q.device)
        view = _View(sizes, block_q, block_k, q.device)
        mass = importance
        if not isinstance(mass, Tensor):
            mass = estimate_importance(
                q, k, mass, block_q=block_q, block_k=block_k, causal=causal, scale=scale,
                sampling=sampling, stride=stride, generator=generator,
            )  # fmt: skip
        levels = _assign(mass, ends, mode, view, causal, tile, compat == "official")
        if protected_blocks:
            levels[..., max(0, levels.shape[3] - protected_blocks) :] = 1
        if causal:
            levels = view.causal(levels, protected_blocks)
        if similarity_caps is not None:
            caps = caps_of(k, block_k, similarity_caps)
            caps = caps.repeat_interleave(sizes.H // sizes.Hk, 1)
            levels = torch.minimum(levels, caps[:, :, None])
        return levels


def estimate_importance(
    q: Tensor,
    k: Tensor,
    kind: str,
    *,
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    scale: float | None = None,
    sampling: int = 4,
    stride: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The importance [B, H, nq, nk] that `pyramid_levels` ranks, with its arguments."""
    op = "estimate_importance"
    sizes = check_qkv(op, q, k, k)
    check_choice(op, "kind", kind, IMPORTANCES)
    blocks = {"block_q": block_q, "block_k": block_k}
    factor = sizes.D**-0.5 if scale is None else float(scale)
    seen = _View(sizes, block_q, block_k, q.device).seen if causal else None
    with torch.no_grad():
        if kind == "antidiagonal":
            return antidiagonal_importance(
                q, k, stride=stride, causal=causal, scale=factor, **blocks
            )
        if kind == "means":
            return mean_importance(q, k, seen=seen, scale=factor, **blocks)
        offsets = [
            draw_offsets(block, block // sampling, (x.shape[0], x.shape[1]), generator, x)
            for block, x in ((block_q, q), (block_k, k))
        ]
        return sampled_importance(q, k, *offsets, seen=seen, scale=factor, **blocks)


class _View:
    """What the blocks of queries see of the blocks of keys, queries aligned with the end."""

    def __init__(self, sizes: Sizes, block_q: int, block_k: int, device: torch.device) -> None:
        self.block_q, self.block_k = block_q, block_k
        first = torch.arange(0, sizes.T, block_q, device=device)
        last = (first + block_q).clamp(max=sizes.T) - 1
        past = sizes.S - sizes.T
        keys = torch.arange(-(-sizes.S // block_k), device=device)
        self.counts = (last + past).div(block_k, rounding_mode="floor").add(1).clamp(min=0)
        own = (first + past).div(block_k, rounding_mode="floor")
        self.seen = keys < self.counts[:, None]
        self.diagonal = self.seen & (keys >= own[:, None])

    def causal(self, levels: Tensor, protected: int) -> Tensor:
        if protected:
            levels[:, :, max(0, levels.shape[2] - protected) :] = 1
        levels = levels.masked_fill(~self.seen, 0).masked_fill(self.diagonal, 1)
        levels[..., 0] = 1
        return levels


def _assign(
    mass: Tensor, ends: dict[int, float], mode: str, view: _View, causal: bool,
    tile: int | None, official: bool,
) -> Tensor:  # fmt: skip
    least = 0 if official else 1
    if causal:
        mass = mass.masked_fill(~view.seen, 0.0)
    if mode == "energybound":
        crossing = "coarser" if official else "finer"
        return assignment.energy_levels(mass, ends, crossing=crossing)
    if mode == "thresholdbound":
        return assignment.threshold_levels(mass, ends, block_k=view.block_k, tile=tile)
    if causal:
        return assignment.counted_levels(mass, ends, view.counts, least=least)
    return assignment.topk_levels(mass, ends, block_k=view.block_k, tile=tile, least=least)


def check_ratios(op: str, ratios: Any, block_k: int) -> dict[int, float]:
    """Level -> end, or an error in the name of `op`."""
    accepted = "a mapping from levels 0, 1, 2, 4, 8 to ends in [0, 1] that never fall"
    if not isinstance(ratios, Mapping) or not ratios:
        raise reject(op, "ratios", accepted, ratios, kind=TypeError)
    ends: dict[int, float] = {}
    for level, share in ratios.items():
        end = share[-1] if isinstance(share, tuple | list) and len(share) == 2 else share
        if level not in (0, 1, 2, 4, 8) or isinstance(end, bool) or not isinstance(end, Real):
            raise reject(op, "ratios", accepted, ratios)
        if not 0 <= float(end) <= 1 or (ends and level and float(end) < max(ends.values())):
            raise reject(op, "ratios", accepted, ratios)
        ends[int(level)] = float(end)
        if level and block_k % level:
            raise reject(op, "ratios", f"levels that divide blocks of {block_k} keys", ratios)
    return ends
