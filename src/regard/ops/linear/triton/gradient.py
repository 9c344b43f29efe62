"""The backward, from what the forward kept to kernels and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.gpu import interpreting
from regard.gpu.operands import channels_last
from regard.gpu.replay import alike
from regard.ops.linear.decays import FORGETS, decays_to_end
from regard.ops.linear.triton.backward import cotangents_kernel, rows_kernel
from regard.ops.linear.triton.launch import PLANS, Launcher
from regard.ops.linear.triton.of_keys import keys_kernel
from regard.ops.linear.triton.of_queries import queries_kernel
from regard.ops.linear.triton.shapes import Options, of_backward, room, width
from regard.ops.linear.triton.table import ROWS, Config, segment
from regard.ops.linear.triton.whole import readers_kernel, writers_kernel


class Kept(NamedTuple):
    """What a call was given, and what the forward kept of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    mask: Tensor | None
    first: Tensor | None
    first_total: Tensor | None
    out: Tensor
    bottoms: Tensor
    starts: Tensor
    start_totals: Tensor


class Gradients(NamedTuple):
    """Of the tensors that have one; what was not wanted has no element."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    first: Tensor
    first_total: Tensor


def backward(
    grad: Tensor, grad_end: Tensor, grad_end_total: Tensor, kept: Kept, options: Options,
    of_decay: bool, of_first: bool,
) -> Gradients:  # fmt: skip
    """Gradients from those of the output and of the last state (no element: none)."""
    of_decay = of_decay and kept.decay is not None
    q, k, v, grad = map(channels_last, (kept.q, kept.k, kept.v, grad))
    kept = kept._replace(q=q, k=k, v=v)
    if kept.first is not None:
        kept = kept._replace(first=kept.first.contiguous())
    if kept.first_total is not None:
        kept = kept._replace(first_total=kept.first_total.contiguous())
    ends: tuple[Tensor | None, Tensor | None] = (None, None)
    if options.wants_state:
        total = grad_end_total.contiguous() if options.normalised else None
        ends = grad_end.contiguous(), total
    found = Gradients(*room(of_backward(q, k, v, options, of_decay, of_first), q))
    whole = None if options.causal else _Whole.of(kept, options)
    extra = () if whole is None else whole
    given = (*kept, grad, *ends, *extra)
    tensors, key = (*given, *found), (options, of_decay, of_first, *alike(*given))
    plan = PLANS.get(key)
    if plan is not None:
        plan.run(tensors)
    else:
        call = Launcher(q, k, v, kept.decay, kept.mask, options)
        if call.empty:
            return _nothing(found, ends)
        rows = _rows(call, grad, kept)
        if whole is None:
            _causal(call, kept, rows, ends, found, of_decay, of_first)
        else:
            _of_whole(call, kept, rows, ends, found, whole)
        PLANS.keep(key, call.steps, tensors)
    return found if whole is None else _finished(kept, found, whole, of_decay, of_first)


def _nothing(found: Gradients, ends: tuple[Tensor | None, Tensor | None]) -> Gradients:
    for x in found:
        x.zero_()
    for x, end in zip(found[4:], ends, strict=True):
        if end is not None and x.numel():
            x.copy_(end.view(x.shape))
    return found


def _rows(call: Launcher, grad: Tensor, kept: Kept) -> dict[str, Any]:
    """The arguments that describe gradients of rows."""
    shares = losses = grad  # are not read
    strides = {"gb": grad.stride(0), "gh": grad.stride(1), "gt": grad.stride(2)}
    if call.options.normalised:
        shares, losses = (call.new(*kept.bottoms.shape) for _ in range(2))
        tiles = -(-call.T // ROWS)
        call.start(
            rows_kernel, tiles * call.B * call.H, Config(ROWS, 0, 4, 1), grad=grad,
            out=kept.out, bottoms=kept.bottoms, shares=shares, losses=losses, tiles=tiles,
            **strides,
        )  # fmt: skip
    return {"grad": grad, "shares": shares, "losses": losses, **strides}


def _cotangents(
    call: Launcher, rows: dict[str, Any], sums: Tensor, totals: Tensor, skip: int,
    with_decay: bool, ends: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """The gradients of states after segments, the last segment's first; see `Launcher.states`."""
    found, count = call.config("cotangents"), sums.shape[1] - 1
    weights = call.new(sums.shape[0], count) if with_decay else None
    call.start(
        cotangents_kernel, count * call.B * call.HK * call.panels(found), found, **rows,
        sums=sums, totals=totals, weights=weights, segments=count, skip=skip,
        chunks=call.segment // found.chunk, MAP=call.map_q.number, FLOORED=call.map_q.floored,
        HAS_DECAY=with_decay,
    )  # fmt: skip
    call.scan(sums, totals, weights, *ends, with_decay)


def _causal(
    call: Launcher, kept: Kept, rows: dict[str, Any], ends: tuple[Tensor | None, Tensor | None],
    found: Gradients, of_decay: bool, of_first: bool,
) -> None:  # fmt: skip
    last, last_total = ends
    normalised, pairs = call.options.normalised, call.B * call.HK
    starts, start_totals = kept.first, kept.first_total
    if kept.starts.numel():
        starts, start_totals = kept.starts, kept.start_totals
    if call.segments > 1:
        last = call.new(pairs, call.segments, call.F, call.E)
        last_total = call.new(pairs, call.segments, call.F) if normalised else last
        _cotangents(call, rows, last, last_total, 1, kept.decay is not None, ends)
    config = call.config("keys")
    of_queries = call.config("queries")
    crossing = states = totals = None
    if of_decay:  # chunks must be the same, as states go from one kernel to the other
        config = call.config("keys_of_decay")
        of_queries = call.config("queries_of_decay")
        chunks = -(-call.length // config.chunk)
        crossing = call.new(call.B, call.H, call.length)
        kind = torch.bfloat16 if call.half else torch.float32
        states = call.new(pairs, chunks, call.F, call.E, dtype=kind)
        totals = call.new(pairs, chunks, call.F) if normalised else None
    call.start(
        queries_kernel, call.segments * call.B * call.H, of_queries, **rows, starts=starts,
        start_totals=start_totals, HAS_START=starts is not None, grad_q=found.q,
        crossing_out=crossing, states_out=states, totals_out=totals, OF_DECAY=of_decay,
        segments=call.segments, chunks=call.segment // of_queries.chunk,
    )  # fmt: skip
    call.start(
        keys_kernel, call.segments * pairs, config, **rows, ends=last,
        end_totals=last_total, HAS_END=last is not None, grad_k=found.k, grad_v=found.v,
        grad_decay=found.decay, crossing_in=crossing, states_in=states, totals_in=totals,
        grad_start=found.first, grad_start_total=found.first_total, OF_DECAY=of_decay,
        OF_START=of_first, segments=call.segments, chunks=call.segment // config.chunk,
    )  # fmt: skip


class _Whole(NamedTuple):
    """What the backward of one state for all queries has besides."""

    sums: Tensor  # the gradient of the state by segments of queries, summed up: the last is it
    totals: Tensor
    leaving: Tensor | None  # decays of keys until the last one
    leaves: Tensor | None  # what goes through them
    kept: Tensor | None  # the decay of what was before the first key
    forgets: Tensor | None  # whose steps have no gradient

    @classmethod
    def of(cls, kept: Kept, options: Options) -> _Whole:
        """Memory and decays."""
        (B, HK, _, E), F = kept.v.shape, width(kept.q.shape[3], options)
        T, S = kept.q.shape[2], kept.v.shape[2]
        shape = B * HK, -(-T // segment(S, interpreting())) + 1, F
        sums = kept.bottoms.new_empty(*shape, E)
        totals = sums.new_empty(shape if options.normalised else 0)
        if kept.decay is None:
            return cls(sums, totals, None, None, None, None)
        decay, forgets = kept.decay, kept.decay < FORGETS
        if kept.mask is not None:
            masked = ~kept.mask[:, None]
            decay, forgets = decay.masked_fill(masked, 0.0), forgets | masked
        decays = decays_to_end(decay[..., None], torch.float32)
        leaving, whole, seen, survives = (x[..., 0] for x in decays)
        leaving = leaving.masked_fill(~seen, 0.0).contiguous()
        whole = whole.masked_fill(~survives, 0.0)
        return cls(sums, totals, leaving, torch.empty_like(leaving), whole, forgets)


def _of_whole(
    call: Launcher, kept: Kept, rows: dict[str, Any], ends: tuple[Tensor | None, Tensor | None],
    found: Gradients, whole: _Whole,
) -> None:  # fmt: skip
    config = call.config("of_read")
    tiles = -(-call.T // config.chunk)
    call.start(
        readers_kernel, tiles * call.B * call.H, config, **rows, states=kept.starts,
        totals=kept.start_totals, places=kept.starts.shape[1], grad_q=found.q, tiles=tiles,
        MAP=call.map_q.number, FLOORED=call.map_q.floored,
    )  # fmt: skip
    _cotangents(call, rows, whole.sums, whole.totals, 0, False, ends)
    tiles = -(-call.S // config.chunk)
    call.start(
        writers_kernel, tiles * call.B * call.HK, config, leaving=whole.leaving,
        states=whole.sums, totals=whole.totals, places=whole.sums.shape[1], grad_k=found.k,
        grad_v=found.v, leaves=whole.leaves, tiles=tiles, MAP=call.map_k.number,
        FLOORED=call.map_k.floored,
    )  # fmt: skip


def _finished(
    kept: Kept, found: Gradients, whole: _Whole, of_decay: bool, of_first: bool
) -> Gradients:
    """The gradients of the first state and of the decays."""
    if not (of_decay or of_first):
        return found
    B, HK, _, E = kept.v.shape
    first = whole.sums[:, -1].reshape(B, HK, -1, E).clone()
    total = whole.totals[:, -1].reshape(B, HK, -1).clone() if whole.totals.numel() else None
    if whole.kept is not None:
        lost = (whole.kept == 0)[..., None]
        first = (first * whole.kept[..., None, None]).masked_fill(lost[..., None], 0.0)
        if total is not None:
            total = (total * whole.kept[..., None]).masked_fill(lost, 0.0)
    of_step = found.decay
    if of_decay:
        assert whole.leaves is not None
        assert whole.forgets is not None
        before = pad(whole.leaves[:, :, :-1].double(), (1, 0)).cumsum(2)
        for x, gradient in ((kept.first, first), (kept.first_total, total)):
            if x is not None and gradient is not None:
                before = before + (x * gradient).flatten(2).sum(2, dtype=torch.float64)[..., None]
        of_step = before.masked_fill(whole.forgets, 0.0).float()
    if not of_first:
        return found._replace(decay=of_step)
    first_total = total if total is not None else found.first_total
    return found._replace(decay=of_step, first=first, first_total=first_total)
