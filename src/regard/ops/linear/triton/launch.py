"""The forward, from the operands of a call to kernels and back: memory, arguments, grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from regard.gpu import interpreting
from regard.gpu.availability import precision
from regard.gpu.operands import channels_last, padded
from regard.gpu.replay import Plans, Recording, alike
from regard.ops.linear.triton.decode import tokens_kernel
from regard.ops.linear.triton.forward import outputs_kernel, scan_kernel, sums_kernel
from regard.ops.linear.triton.shapes import Options, Twofold, of_forward, room
from regard.ops.linear.triton.table import (
    FEW,
    MAPS,
    PANEL_OF_TOKENS,
    SCANNED,
    Config,
    config,
    keys,
    segment,
)
from regard.ops.linear.triton.twofold import (
    narrow_outputs_kernel,
    twofold_sums_kernel,
    wide_outputs_kernel,
)
from regard.ops.linear.triton.whole import read_kernel

PLANS = Plans()
Maps = tuple[Tensor | None, Tensor | None]  # of queries and of keys, those of `learned`


class Launcher:
    """One call on its way through the kernels: sizes, constants and common arguments."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, mask: Tensor | None,
        options: Options, maps: Maps = (None, None),
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = channels_last(q), channels_last(k), channels_last(v)
        self.decay, self.mask, self.options = decay, mask, options
        self.steps = Recording()
        self.B, self.H, self.T, self.D = q.shape
        self.HK, self.S, self.E = v.shape[1:]
        self.map_q, self.map_k = MAPS[options.query_map], MAPS[options.key_map]
        self.two = self.map_k.two
        self.F = 2 * self.D if self.two else self.D
        self.DP, self.EP = padded(self.D), padded(self.E)
        self.interpreted = interpreting()
        self.half = v.dtype == torch.bfloat16
        self.length = max(self.T, self.S) if options.causal else self.S
        self.twofold = Twofold.of(v, self.D, options, decay is not None, self.interpreted)
        self.segment = segment(self.length, self.interpreted, self.twofold.wide)
        self.segments = -(-self.length // self.segment)
        self.empty = 0 in (self.B, self.H, self.D, self.E, self.length, max(self.T, self.S))
        # float16 has no room for sums; TF32 has its digits.
        exact = precision(False)
        short = exact == "tf32x3" and v.dtype == torch.float16
        q, k, v = self.q, self.k, self.v
        self.common: dict[str, Any] = {
            "q": q, "qb": q.stride(0), "qh": q.stride(1), "qt": q.stride(2),
            "k": k, "kb": k.stride(0), "kh": k.stride(1), "kt": k.stride(2),
            "v": v, "vb": v.stride(0), "vh": v.stride(1), "vt": v.stride(2),
            "decay": decay, "db": 0, "dh": 0, "dt": 0, "mask": mask, "mb": 0, "mt": 0,
            "T": self.T, "S": self.S, "scale": options.scale, "minimum": options.minimum,
            "epsilon": options.epsilon, "H": self.H, "HK": self.HK, "D": self.D, "DP": self.DP,
            "E": self.E, "EP": self.EP, "TWO": self.two,
            "MAP_Q": self.map_q.number, "FLOORED_Q": self.map_q.floored,
            "MAP_K": self.map_k.number, "FLOORED_K": self.map_k.floored,
            "HAS_DECAY": decay is not None, "HAS_MASK": mask is not None,
            "NORMALISED": options.normalised, "SCALED": options.scale != 1.0,
            "CAUSAL": options.causal,
            "OPERAND": tl.bfloat16 if self.half else tl.float32,
            "SUMS": tl.float32 if self.half else tl.float64,
            "PRECISION": "ieee" if self.half else "tf32" if short else exact,
        }  # fmt: skip
        forms = self.twofold.forms(self.length, self.interpreted)
        for name, weight, formed in zip("qk", maps, forms, strict=True):
            if weight is not None and not formed:
                raise ValueError(f"linear_triton_fwd: no kernel of this call applies map_{name}")
            several = weight is not None and weight.shape[0] > 1
            self.common |= {
                f"map_{name}": weight, f"w{name}": self.D * self.D if several else 0,
                f"LEARNED_{name.upper()}": weight is not None,
            }  # fmt: skip
        if decay is not None:
            self.common["db"], self.common["dh"], self.common["dt"] = decay.stride()
        if mask is not None:
            self.common["mb"], self.common["mt"] = mask.stride()

    def config(self, kernel: str) -> Config:
        found = config(kernel, 2 if self.two else 1, self.DP, self.half, self.interpreted)
        return found._replace(panel=min(found.panel, self.EP))

    def start(self, kernel: Any, programs: int, config: Config, **arguments: Any) -> None:
        """Starts a kernel on what it knows of the common arguments and these."""
        given = {**self.common, **arguments, "C": config.chunk, "PANEL": config.panel}
        own = {name: given[name] for name in kernel.arg_names}
        if programs:
            self.steps.start(
                kernel, programs, own, warps=config.warps, stages=config.stages,
                registers=config.registers,
            )  # fmt: skip

    def panels(self, config: Config) -> int:
        return -(-self.E // config.panel)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scratch memory."""
        return self.steps.empty(*shape, dtype=dtype, device=self.q.device)

    def scan(
        self, sums: Tensor, totals: Tensor, weights: Tensor | None, first: Tensor | None,
        first_total: Tensor | None, HAS_DECAY: bool,
    ) -> None:  # fmt: skip
        """From what segments add to the state before each, in place."""
        size, total = self.F * self.E, self.F if self.options.normalised else 0
        programs = -(-size // SCANNED) + -(-total // SCANNED)
        self.start(
            scan_kernel, sums.shape[0] * programs, Config(0, 0, 4, 1), sums=sums, totals=totals,
            weights=weights, start=sums if first is None else first,
            start_total=sums if first_total is None else first_total,
            segments=sums.shape[1] - 1, SIZE=size, TOTAL=total, BLOCK=SCANNED,
            HAS_DECAY=HAS_DECAY, HAS_START=first is not None,
            HAS_START_TOTAL=first_total is not None,
        )  # fmt: skip

    def states(
        self, sums: Tensor, totals: Tensor, first: Tensor | None, first_total: Tensor | None
    ) -> None:
        """The states before segments 0, 1 .. of the keys: [B HK, count + 1, F, E] and [.., F]."""
        count = sums.shape[1] - 1
        if self.twofold.serves:
            self.sums_of_twofold(sums, totals, count)
            self.scan(sums, totals, None, first, first_total, False)
            return
        weights = self.new(sums.shape[0], count) if self.decay is not None else None
        found = self.config("sums")
        self.start(
            sums_kernel, count * self.B * self.HK * self.panels(found), found, sums=sums,
            totals=totals, weights=weights, offset=self.length - self.S, segments=count,
            chunks=self.segment // found.chunk, MAP=self.map_k.number,
            FLOORED=self.map_k.floored,
        )  # fmt: skip
        self.scan(sums, totals, weights, first, first_total, self.decay is not None)

    def spread(self, config: Config) -> int:
        """Rows of a chunk of keys that one pass of all threads has."""
        return min(max(16, config.warps * 256 // self.DP), config.chunk)

    def sums_of_twofold(
        self, sums: Tensor, totals: Tensor, segments: int, skip: int = 0,
        start: Tensor | None = None, start_total: Tensor | None = None,
    ) -> None:  # fmt: skip
        """What segments skip, skip + 1 .. add; after `start`, if it is given."""
        found, pairs, kept = self.config("twofold_sums"), self.B * self.HK, segments
        mapped, spread = None, self.spread(found)
        if self.common["LEARNED_K"]:  # of all segments, and of all that comes later
            mapped, segments = self.new(*self.k.shape, dtype=self.k.dtype), segments + 1
            spread = found.chunk // 2
        self.start(
            twofold_sums_kernel, segments * pairs * self.panels(found), found, sums=sums,
            totals=totals, start=start, start_total=start_total, HAS_START=start is not None,
            offset=self.length - self.S, places=sums.numel() // (pairs * self.F * self.E),
            segments=segments, kept=kept, skip=skip, chunks=self.segment // found.chunk,
            SPREAD=spread, mapped=mapped,
        )  # fmt: skip
        if mapped is not None:
            self.common |= {
                "k": mapped, "kb": mapped.stride(0), "kh": mapped.stride(1),
                "kt": mapped.stride(2), "LEARNED_K": False,
            }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, mask: Tensor | None,
    first: Tensor | None, first_total: Tensor | None, options: Options,
    maps: Maps = (None, None),
) -> tuple[Tensor, ...]:  # fmt: skip
    """out [B, H, T, E], the last state S and z where it is wanted; then, for the backward, the
    sums of weights [B, H, T] and the states before each segment. What there is not has no element.
    """
    q, k, v = channels_last(q), channels_last(k), channels_last(v)
    first = None if first is None else first.contiguous()
    first_total = None if first_total is None else first_total.contiguous()
    results = room(of_forward(q, v, options, decay is not None, interpreting()), q)
    map_q, map_k = (x if x is None else x.contiguous() for x in maps)
    given = (q, k, v, decay, mask, first, first_total, map_q, map_k)
    tensors, key = (*given, *results), (options, *alike(*given))
    plan = PLANS.get(key)
    if plan is not None:
        plan.run(tensors)
    else:
        call = Launcher(q, k, v, decay, mask, options, (map_q, map_k))
        if call.empty:
            return _nothing(results, first, first_total)
        _run(call, first, first_total, results)
        PLANS.keep(key, call.steps, tensors)
    if not options.causal and options.wants_state:
        for end, states in zip(results[1:3], results[4:6], strict=True):
            if end.numel():
                end.copy_(states[:, -1].view(end.shape))
    return tuple(results)


def _nothing(
    results: Sequence[Tensor], first: Tensor | None, first_total: Tensor | None
) -> tuple[Tensor, ...]:
    """Of a call without tokens, heads or channels."""
    for x in results:
        x.zero_()
    for x, start in zip(results[1:3], (first, first_total), strict=True):
        if start is not None and x.numel():
            x.copy_(start)
    return tuple(results)


def _run(
    call: Launcher, first: Tensor | None, first_total: Tensor | None, results: Sequence[Tensor]
) -> None:
    """Starts the kernels of a call."""
    options, (out, end, end_total, bottoms, starts, start_totals) = call.options, results
    arguments = {"out": out, "bottoms": bottoms, "end": end, "end_total": end_total}
    pairs = call.B * call.H
    if not options.causal:
        call.states(starts, start_totals, first, first_total)
        found = call.config("read")
        tiles = -(-call.T // found.chunk)
        call.start(
            read_kernel, tiles * pairs * call.panels(found), found, **arguments, states=starts,
            totals=start_totals, places=starts.shape[1], tiles=tiles, MAP=call.map_q.number,
            FLOORED=call.map_q.floored,
        )  # fmt: skip
        return
    if call.length <= FEW:
        found = Config(0, min(PANEL_OF_TOKENS, call.EP), 4, 1)
        call.start(
            tokens_kernel, call.B * call.HK * call.panels(found), found, **arguments,
            start=first, start_total=first_total, HAS_START=first is not None,
            WANTS_END=options.wants_state,
        )  # fmt: skip
        return
    before, before_total = first, first_total
    if call.segments > 1:
        call.states(starts, start_totals, first, first_total)
        before, before_total = starts, start_totals
    if call.twofold.serves:
        _outputs_of_twofold(call, before, before_total, results)
        return
    mapped = call.map_q.number != 0 and not call.two and call.DP == 128
    found = call.config("mapped_outputs" if mapped and call.half else "outputs")
    call.start(
        outputs_kernel, call.segments * pairs * call.panels(found), found, **arguments,
        starts=before, start_totals=before_total, HAS_START=before is not None,
        WANTS_END=options.wants_state, segments=call.segments,
        chunks=call.segment // found.chunk,
    )  # fmt: skip


def _outputs_of_twofold(
    call: Launcher, before: Tensor | None, before_total: Tensor | None, results: Sequence[Tensor]
) -> None:
    out, end, end_total, bottoms, *_ = results
    found, ends = call.config("twofold_outputs"), call.options.wants_state
    chunks = call.segment // found.chunk
    programs = call.segments * call.B * call.H * call.panels(found)
    arguments = {
        "out": out, "bottoms": bottoms, "starts": before, "start_totals": before_total,
        "HAS_START": before is not None, "segments": call.segments,
    }  # fmt: skip
    if not call.twofold.wide:
        call.start(
            narrow_outputs_kernel, programs, found, **arguments, end=end, end_total=end_total,
            WANTS_END=ends, chunks=chunks, SPREAD=call.spread(found),
        )  # fmt: skip
        return
    call.start(
        wide_outputs_kernel, programs * chunks, found, **arguments, tiles=chunks,
        KEYS=keys(call.interpreted),
    )  # fmt: skip
    if ends:
        call.sums_of_twofold(end, end_total, 1, call.segments - 1, before, before_total)
