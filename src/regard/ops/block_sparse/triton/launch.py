"""From the operands of a call to kernels and back: memory, arguments, grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.gpu import interpreting
from regard.gpu.availability import capability, precision
from regard.gpu.operands import channels_last, padded
from regard.gpu.replay import Plans, Recording, alike
from regard.ops.block_sparse.pyramid import POOLED
from regard.ops.block_sparse.triton import table
from regard.ops.block_sparse.triton.forward import combine_kernel, forward_kernel
from regard.ops.block_sparse.triton.lists import lists_kernel
from regard.ops.block_sparse.triton.of_keys import coarse_keys_kernel, keys_kernel
from regard.ops.block_sparse.triton.of_queries import queries_kernel
from regard.ops.block_sparse.triton.pooling import pooling_kernel
from regard.ops.block_sparse.triton.table import Config, config

PLANS = Plans()


class Settings(NamedTuple):
    """What is not a tensor in a call; without a plan all keys in reach are attended to."""

    indices: bool
    block_q: int
    block_k: int
    left: int
    right: int
    scale: float


class Lists(NamedTuple):
    """What `lists_kernel` writes; `offsets` where a list does not begin at a multiple of width."""

    entries: Tensor
    ends: Tensor
    offsets: Tensor | None
    width: int


class Coarse(NamedTuple):
    """Pooled rows of all levels, what they weigh (with biases), and how many a list has."""

    k: Tensor
    v: Tensor
    weights: Tensor | None
    some: Tensor | None


class Launcher:
    """One call on its way through the kernels: sizes, constants and common arguments."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Tensor | None,
        scales: Tensor | None, settings: Settings,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.bias, self.plan = q, k, v, bias, plan
        self.settings, self.steps = settings, Recording()
        self.B, self.H, self.T, self.D = q.shape
        self.HK, self.S, self.E = v.shape[1:]
        self.DP, self.EP = padded(self.D), padded(self.E)
        self.half, self.interpreted = q.element_size() == 2, interpreting()
        self.PB, self.PH = (1, 1) if plan is None else plan.shape[:2]
        group = self.H // self.HK
        self.members = group if self.PH in (1, self.HK) else 1
        self.block_q, self.block_k = settings.block_q, settings.block_k
        self.levels = (1,)
        if plan is not None and not settings.indices and plan.dtype != torch.bool:
            self.levels = (1, *(x for x in POOLED if self.block_k % x == 0))
        self.pooled = len(self.levels) > 1
        self.chunk = 32 if self.interpreted else table.CHUNK
        self.coarse_rows = sum(-(-self.S // level) for level in POOLED)
        self.common: dict[str, Any] = {
            "q": q, "qb": q.stride(0), "qh": q.stride(1), "qt": q.stride(2),
            "k": k, "kb": k.stride(0), "kh": k.stride(1), "kt": k.stride(2),
            "v": v, "vb": v.stride(0), "vh": v.stride(1), "vt": v.stride(2),
            "bias": bias, "scales": scales, "sb": 0, "sh": 0, "scale": settings.scale,
            "T": self.T, "S": self.S, "left": settings.left, "right": settings.right,
            "H": self.H, "HK": self.HK, "SHARE": self.B // self.PB, "PH": self.PH,
            "BIAS_HEADS": 1 if bias is None else bias.shape[1], "MEMBERS": self.members,
            "BLOCK_Q": self.block_q, "BLOCK_K": self.block_k,
            "D": self.D, "DP": self.DP, "E": self.E, "EP": self.EP,
            "RANGES": plan is None, "POOLED": self.pooled, "HAS_BIAS": bias is not None,
            "HAS_SCALES": scales is not None, "HAS_LEFT": settings.left >= 0,
            "HAS_RIGHT": settings.right >= 0, "PRECISION": precision(self.half),
        }  # fmt: skip
        if scales is not None:
            self.common["sb"], self.common["sh"] = scales.stride()

    def start(self, kernel: Any, programs: int, how: Config | None, **arguments: Any) -> None:
        """Starts a kernel on what it knows of the common arguments and these."""
        given = {**self.common, **arguments}
        own = {name: given[name] for name in kernel.arg_names}
        how = Config(0, 0, 4, 1) if how is None else how
        if programs:
            self.steps.start(
                kernel, programs, own, warps=how.warps, stages=how.stages,
                registers=how.registers,
            )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scratch memory."""
        return self.steps.empty(*shape, dtype=dtype, device=self.q.device)

    def config(self, kernel: str) -> Config:
        """The tiles of a kernel: no more queries than share a list."""
        rows = None if self.plan is None else padded(self.members * self.block_q)
        hopper = not self.q.is_cuda or capability(self.q.device) == "sm_90"
        width = max(self.DP, self.EP)
        found = config(kernel, width, self.half, rows, self.interpreted, hopper)
        if rows is None:
            return found._replace(queries=min(found.queries, padded(self.T)))
        if kernel == "keys":
            return found
        if self.block_k >= table.CUT and found.keys % self.block_k == 0:  # no tile of two blocks
            found = found._replace(keys=self.block_k)
        return found._replace(queries=min(found.queries, rows))

    def blocks(self, how: Config) -> dict[str, int]:
        """Block sizes of a kernel: without a plan its tiles are the blocks."""
        if self.plan is not None:
            return {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k}
        return {"BLOCK_Q": how.queries, "BLOCK_K": how.keys}

    def lists(
        self, some: Tensor | None, codes: Tensor | None = None, offsets: Tensor | None = None,
        both: bool = False,
    ) -> tuple[Lists, Lists]:  # fmt: skip
        """Lists of blocks of keys and, with `both`, of queries; none for a call without a plan."""
        plan = self.plan
        if plan is None:
            nothing = self.new(1, dtype=torch.int32)
            none = Lists(nothing, nothing, None, 0)
            return none, none
        (nq, width), keys = plan.shape[2:], -(-self.S // self.block_k)
        heads = self.PB * self.PH
        found = turned = Lists(
            self.new(heads * nq * width, dtype=torch.int32),
            self.new(heads * nq, 8, dtype=torch.int32), None, width,
        )  # fmt: skip
        if both:
            wide, rows = (nq, keys) if codes is None else (codes.shape[1], 1)
            turned = Lists(
                self.new(heads * rows * wide, dtype=torch.int32),
                self.new(heads * keys, 8, dtype=torch.int32), offsets, wide,
            )  # fmt: skip
        self.start(
            lists_kernel, heads * (nq + keys if both else nq), table.ONE_WARP, plan=plan,
            codes=codes, offsets=offsets, entries=found.entries, ends=found.ends, pooled=some,
            turned=turned.entries, turned_ends=turned.ends, sp=plan.stride(1),
            sr=plan.stride(2), sx=plan.stride(3), lists=heads * nq, width=width,
            wide=turned.width, blocks=keys, nq=nq, MAP=not self.settings.indices, BOTH=both,
            CHUNK=self.chunk,
        )  # fmt: skip
        return found, turned

    def coarse(self) -> Coarse:
        """Memory for pooled rows."""
        if self.plan is None or not self.pooled:
            nothing = self.new(1, dtype=torch.int32)
            return Coarse(nothing, nothing, None, None)
        pairs, dtype = self.B * self.HK, self.q.dtype
        weights = None
        if self.bias is not None:
            weights = self.new(self.B * self.bias.shape[1], self.coarse_rows)
        return Coarse(
            self.new(pairs, self.coarse_rows, self.D, dtype=dtype),
            self.new(pairs, self.coarse_rows, self.E, dtype=dtype), weights,
            self.new(self.PB * self.PH * self.plan.shape[2], dtype=torch.int32),
        )  # fmt: skip

    def pool(self, coarse: Coarse) -> None:
        """Fills it where a list has pooled blocks."""
        if self.plan is not None and self.pooled:
            tokens = 16 if self.interpreted else table.pooled_tokens(max(self.DP, self.EP))
            tiles = -(-self.S // (tokens * table.TILES))
            self.start(
                pooling_kernel, self.B * self.HK * tiles, None, pooled=coarse.some,
                coarse_k=coarse.k, coarse_v=coarse.v, weights=coarse.weights, tiles=tiles,
                queries=self.plan.shape[2], N=tokens, TILES=table.TILES, CHUNK=self.chunk,
            )  # fmt: skip

    def of_lists(self, how: Config, lists: Lists, coarse: Coarse) -> dict[str, Any]:
        """Arguments of a kernel whose programs are tiles of queries."""
        sizes = self.blocks(how)
        queries = -(-self.T // sizes["BLOCK_Q"])
        per_block = -(-self.members * sizes["BLOCK_Q"] // how.queries)
        return {
            **sizes, "entries": lists.entries, "ends": lists.ends, "width": lists.width,
            "coarse_k": coarse.k, "coarse_v": coarse.v, "weights": coarse.weights,
            "tiles": queries * per_block, "queries": queries, "M": how.queries, "N": how.keys,
            "NC": how.keys if self.plan is None else min(how.keys, table.CUT),
        }  # fmt: skip

    def users(self) -> int:
        """Heads, or groups of heads, that have a list of their own."""
        return self.B * self.H // self.members


def sorted_indices(plan: Tensor) -> Tensor:
    """Indices of blocks in order, in which the kernel finds what was named twice."""
    return plan.to(torch.int32).sort(-1).values


def transposed_indices(plan: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """From sorted indices [Bp, Hp, nq, n] to codes `block nq + query` in order, [Bp Hp, nq n], and
    where each block's begin, [Bp Hp, blocks + 1]; nothing that the host would have to know.
    """
    nq = plan.shape[2]
    known = (plan >= 0) & (plan < blocks)
    known[..., 1:] &= plan[..., 1:] != plan[..., :-1]
    wide = torch.int32 if (blocks + 1) * nq < 1 << 31 else torch.int64
    query = torch.arange(nq, device=plan.device, dtype=wide)[:, None]
    codes = torch.where(known, plan, blocks).to(wide) * nq + query
    codes = codes.flatten(0, 1).flatten(1).sort(-1).values
    first = torch.arange(blocks + 1, device=plan.device, dtype=wide) * nq
    first = first.expand(codes.shape[0], -1).contiguous()
    return codes, torch.searchsorted(codes, first, out_int32=True)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Tensor | None,
    scales: Tensor | None, settings: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, T, Dv] and, in float32, log-sum-exp [B, H, T]."""
    q, k, v = channels_last(q), channels_last(k), channels_last(v)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not out.numel() or not k.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    if plan is not None:
        plan = _three_axes(sorted_indices(plan) if settings.indices else plan)
    bias = None if bias is None else bias.contiguous()
    tensors = (q, k, v, bias, plan, scales, out, lse)
    key = ("forward", settings, *alike(*tensors))
    known = PLANS.get(key)
    if known is not None:
        known.run(tensors)
        return out, lse
    call = Launcher(q, k, v, bias, plan, scales, settings)
    coarse = call.coarse()
    lists, _ = call.lists(coarse.some)
    call.pool(coarse)
    how = call.config("forward")
    width = call.S if plan is None else plan.shape[3] * call.block_k
    parts = table.parts(call.T, min(width, call.S), call.interpreted)
    room = [out, lse, lse]
    if parts > 1:
        rows = call.B * call.H * call.T
        room = [call.new(parts, rows, call.E), *(call.new(parts, rows) for _ in range(2))]
    given = call.of_lists(how, lists, coarse)
    of_parts = dict(zip(("part_out", "part_top", "part_total"), room, strict=True))
    call.start(
        forward_kernel, given["tiles"] * call.users() * parts, how, out=out, lse=lse,
        **given, **of_parts, SPLITS=parts, FLIP=scales is not None or settings.scale < 0,
    )  # fmt: skip
    if parts > 1:
        call.start(
            combine_kernel, call.B * call.H * call.T, None, out=out, lse=lse, **of_parts,
            rows=call.B * call.H * call.T, SPLITS=parts,
        )  # fmt: skip
    PLANS.keep(key, call.steps, tensors)
    return out, lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, plan: Tensor | None, scales: Tensor | None, settings: Settings,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, in float32 by head of keys [B, Hk, S], of bias (or nothing)."""
    q, k, v, grad = (channels_last(x) for x in (q, k, v, grad))
    out, lse = out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    of_bias = of_bias and bias is not None
    d_bias = q.new_empty(k.shape[:3] if of_bias else (0,), dtype=torch.float32)
    if not out.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), d_bias.zero_()
    codes = offsets = None
    if plan is not None:
        if settings.indices:
            plan = sorted_indices(plan)
            codes, offsets = transposed_indices(plan, -(-k.shape[2] // settings.block_k))
        plan = _three_axes(plan)
    bias = None if bias is None else bias.contiguous()
    tensors = (
        q, k, v, bias, plan, scales, grad, out, lse, codes, offsets, dq, dk, dv, d_bias,
    )  # fmt: skip
    key = ("backward", settings, of_bias, *alike(*tensors))
    known = PLANS.get(key)
    if known is not None:
        known.run(tensors)
        return dq, dk, dv, d_bias
    call = Launcher(q, k, v, bias, plan, scales, settings)
    coarse = call.coarse()
    lists, turned = call.lists(coarse.some, codes, offsets, both=True)
    call.pool(coarse)
    rows = call.B * call.H * call.T
    of_grad: dict[str, Any] = {
        "sums": call.new(rows, 2), "grad": grad,
        "gb": grad.stride(0), "gh": grad.stride(1), "gt": grad.stride(2),
    }  # fmt: skip
    how = call.config("queries")
    given = call.of_lists(how, lists, coarse)
    call.start(
        queries_kernel, given["tiles"] * call.users(), how, **given, **of_grad, out=out, lse=lse,
        grad_q=dq,
    )  # fmt: skip
    how = call.config("keys")
    sizes = call.blocks(how)
    blocks = -(-call.S // sizes["BLOCK_K"])
    pairs = call.B * call.HK
    of_keys = {
        **given, **sizes, **of_grad, "entries": turned.entries, "ends": turned.ends,
        "width": turned.width, "blocks": blocks, "M": how.queries, "OF_BIAS": of_bias,
        "coarse_dk": dk, "coarse_dv": dv, "coarse_db": d_bias,  # of no use without levels
    }  # fmt: skip
    if call.pooled:
        of_keys["coarse_dk"] = call.new(pairs, call.coarse_rows, call.D)
        of_keys["coarse_dv"] = call.new(pairs, call.coarse_rows, call.E)
        if of_bias:
            of_keys["coarse_db"] = call.new(pairs, call.coarse_rows)
        rows_of = {level: sizes["BLOCK_K"] // level for level in call.levels[1:]}
        wide_of = {level: min(how.keys, padded(count)) for level, count in rows_of.items()}
        tiles = sum(-(-rows_of[level] // wide_of[level]) for level in rows_of)
        call.start(
            coarse_keys_kernel, pairs * blocks * tiles, how, **of_keys, pairs=pairs,
            WIDE=tuple(wide_of.get(level, 0) for level in POOLED),
        )  # fmt: skip
    wide = min(how.keys, padded(sizes["BLOCK_K"]))
    tiles = blocks * -(-sizes["BLOCK_K"] // wide)
    call.start(
        keys_kernel, pairs * tiles, how, **{**of_keys, "tiles": tiles, "N": wide},
        offsets=turned.offsets, grad_k=dk, grad_v=dv, grad_bias=d_bias, RUNS=codes is not None,
    )  # fmt: skip
    PLANS.keep(key, call.steps, tensors)
    return dq, dk, dv, d_bias


def _three_axes(plan: Tensor) -> Tensor:
    """A plan whose heads of all batch rows are one stride apart."""
    even = plan.shape[0] == 1 or plan.stride(0) == plan.shape[1] * plan.stride(1)
    return plan if even else plan.contiguous()
