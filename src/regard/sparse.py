"""Block-sparse attention in three calls: make a plan, attend by it, see what it costs.

>>> import torch
>>> q, k, v = torch.randn(3, 1, 2, 512, 16)
>>> plan = sparsify(q, k, density=0.3, block=64)
>>> attend(plan, q, k, v).shape, plan.density() <= 0.3
(torch.Size([1, 2, 512, 16]), True)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.core.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_qkv,
    reject,
)
from regard.ops.block_sparse import BlockPlan, block_sparse_attention
from regard.ops.pyramid_sparse import pyramid_levels
from regard.ops.pyramid_sparse.levels import estimate_importance
from regard.ops.softmax import softmax_attention

__all__ = ["DensityCurve", "DensityPoint", "attend", "density_curve", "sparsify"]

POLICIES = ("pyramid", "binary", "local")


def sparsify(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    *,
    density: float = 0.2,
    policy: str = "pyramid",
    block: int = 128,
    causal: bool = False,
    scale: float | None = None,
    importance: str = "sampled",
    generator: torch.Generator | None = None,
) -> BlockPlan:
    """A plan that does at most a share `density` of the work of dense attention.

    Policies: "pyramid", the most important blocks of keys at full resolution with half of the
    work, the next ones pooled by 2, 4 and 8; "binary", the most important blocks and no others;
    "local", the nearest blocks, whatever they hold. Every row has at least its most important
    (or own) block, and with `causal` the first one and those of its own position, so very small
    densities may be exceeded.

    Args:
        q, k: [B, H, T, D], [B, Hk, S, D].
        density: in (0, 1]; with `causal`, of the work of causal attention. 1 keeps everything.
        importance, generator, scale: as in `pyramid_levels`.

    Raises: TypeError, ValueError naming the argument.
    """
    op = "sparsify"
    sizes = check_qkv(op, q, k, k)
    check_number(op, "density", density, above=0.0)
    if density > 1:
        raise reject(op, "density", "in (0, 1]", density)
    check_choice(op, "policy", policy, POLICIES)
    check_integer(op, "block", block)
    check_flag(op, "causal", causal)
    blocks = -(-sizes.T // block), -(-sizes.S // block)
    if density == 1 or not sizes.T or not sizes.S:
        levels = torch.ones(1, 1, *blocks, dtype=torch.int8, device=q.device)
        return BlockPlan(levels, sizes.T, sizes.S, block, block)
    chosen: Any = importance
    if policy == "local":
        rows = torch.arange(blocks[0], device=q.device)[:, None] + (sizes.S - sizes.T) // block
        distance = (rows - torch.arange(blocks[1], device=q.device)).abs()
        chosen = (1.0 / (1 + distance)).expand(sizes.B, sizes.H, *blocks)

    def levels_at(work: float) -> BlockPlan:
        ends = _pyramid(work, block) if policy == "pyramid" else {1: work, 0: 1.0}
        levels = pyramid_levels(
            q, k, ratios=ends, mode="topk", importance=chosen, block_q=block, block_k=block,
            causal=causal, scale=scale,
        )  # fmt: skip
        return BlockPlan(levels, sizes.T, sizes.S, block, block)

    if not isinstance(chosen, Tensor):
        sampling = min(4, block)
        chosen = estimate_importance(
            q, k, chosen, block_q=block, block_k=block, causal=causal, scale=scale,
            sampling=sampling, generator=generator,
        )  # fmt: skip
    plan = levels_at(density)
    low, high = 0.0, density
    for _ in range(8 if plan.density(causal) > density else 0):
        middle = (low + high) / 2
        found = levels_at(middle)
        if found.density(causal) > density:
            high = middle
        else:
            low, plan = middle, found
    return plan if plan.density(causal) <= density else levels_at(low)


def attend(
    plan: BlockPlan,
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Attention by a plan, [B, H, T, Dv]; ValueError if it was made for other lengths."""
    if not isinstance(plan, BlockPlan):
        raise reject("attend", "plan", "a BlockPlan", plan, kind=TypeError)
    plan.validate(q, k)
    return block_sparse_attention(
        q, k, v, plan.for_attention().to(q.device), block_q=plan.block_q, block_k=plan.block_k,
        causal=causal, scale=scale, key_mask=key_mask, impl=impl,
    )  # fmt: skip


@dataclass(frozen=True)
class DensityPoint:
    """What one policy gives at one density: `density` is that of the plan made.

    error: relative L2 distance to dense attention. attend_seconds, plan_seconds: CPU time of a
    call with the plan, and of making it.
    """

    policy: str
    asked: float
    density: float
    error: float
    attend_seconds: float
    plan_seconds: float


@dataclass(frozen=True)
class DensityCurve:
    """Accuracy, work and time of policies on somebody's own q, k and v."""

    points: tuple[DensityPoint, ...]
    dense_seconds: float

    def draw(self, path: str | Path | None = None) -> Any:
        """Error against density, and speed against density; the matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for policy in dict.fromkeys(point.policy for point in self.points):
            own = [point for point in self.points if point.policy == policy]
            density = [point.density for point in own]
            left.plot(density, [point.error for point in own], "o-", label=policy)
            speeds = [self.dense_seconds / max(p.attend_seconds, 1e-9) for p in own]
            whole = [self.dense_seconds / max(p.attend_seconds + p.plan_seconds, 1e-9) for p in own]
            line = right.plot(density, speeds, "o-", label=policy)[0]
            right.plot(density, whole, ":", color=line.get_color(), label=f"{policy}, with plan")
        left.set(xlabel="density", ylabel="relative error", ylim=(0, None))
        right.set(xlabel="density", ylabel="times as fast as dense", ylim=(0, None))
        right.axhline(1.0, color="gray", linewidth=0.8)
        left.legend(frameon=False)
        right.legend(frameon=False, fontsize="small")
        if path is not None:
            figure.savefig(path)
        return figure


def density_curve(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    densities: Sequence[float] = (0.1, 0.2, 0.3, 0.5),
    policies: Sequence[str] = ("pyramid", "binary"),
    block: int = 128,
    causal: bool = False,
    scale: float | None = None,
    importance: str = "sampled",
    repeats: int = 3,
) -> DensityCurve:
    """How accurate and how fast each policy is at each density, against dense attention.

    q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv]. Times are the least of `repeats` calls in
    CPU time of the process (elapsed time on a GPU).

    Raises: TypeError, ValueError naming the argument.
    """
    op = "density_curve"
    check_qkv(op, q, k, v)
    check_integer(op, "repeats", repeats)
    for policy in policies:
        check_choice(op, "policies", policy, POLICIES)
    with torch.no_grad():
        exact, dense_seconds = _timed(
            lambda: softmax_attention(q, k, v, causal=causal, scale=scale), q, repeats
        )
        points = []
        for policy in policies:
            for density in densities:
                plan, plan_seconds = _timed(
                    lambda policy=policy, density=density: sparsify(
                        q, k, density=density, policy=policy, block=block, causal=causal,
                        scale=scale, importance=importance,
                    ), q, repeats,
                )  # fmt: skip
                out, seconds = _timed(
                    lambda plan=plan: attend(plan, q, k, v, causal=causal, scale=scale), q, repeats
                )
                error = (out.double() - exact.double()).norm() / exact.double().norm()
                points.append(DensityPoint(
                    policy, density, plan.density(causal), float(error), seconds, plan_seconds
                ))  # fmt: skip
    return DensityCurve(tuple(points), dense_seconds)


def _pyramid(work: float, block: int) -> dict[int, float]:
    """Shares of blocks by level: half of the work at level 1, a sixth at each pooled level."""
    levels = [level for level in (2, 4, 8) if block % level == 0]
    ends, end = {1: min(1.0, work / 2 if levels else work)}, min(1.0, work / 2)
    left = work / 2
    for level in levels:
        share = min(1.0 - end, left / len(levels) * level)
        end += share
        ends[level] = min(1.0, end)
    spare = work - sum(
        (ends[level] - before) / level
        for level, before in zip(ends, [0.0, *ends.values()], strict=False)
    )
    if spare > 1e-9 and math.isclose(end, 1.0):
        # Everything is attended to and work is left: levels 1 and the coarsest share the blocks.
        coarse = levels[-1]
        fine = (work - 1 / coarse) / (1 - 1 / coarse)
        ends = {1: min(1.0, max(0.0, fine)), coarse: 1.0}
    ends[0] = 1.0
    return ends


def _timed(call: Any, like: Tensor, repeats: int) -> tuple[Any, float]:
    best = math.inf
    result = None
    clock = time.perf_counter if like.is_cuda else time.process_time
    for _ in range(repeats):
        start = clock()
        result = call()
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        best = min(best, clock() - start)
    return result, best
