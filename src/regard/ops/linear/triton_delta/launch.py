"""From the operands of a call to kernels and back: memory, arguments, grids.

Nothing here waits for the device. The forward starts three kernels, four where keys are made
unit vectors or decay; the backward computes states anew and starts three more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from regard.gpu.availability import interpreting, precision
from regard.gpu.replay import Plans, Recording, alike
from regard.gpu.start import Shared
from regard.ops.linear.triton_delta.decode import decode_kernel
from regard.ops.linear.triton_delta.gradient_kernels import (
    asked_kernel,
    readers_kernel,
    writers_kernel,
)
from regard.ops.linear.triton_delta.output import output_kernel
from regard.ops.linear.triton_delta.scan import scan_kernel
from regard.ops.linear.triton_delta.system import inverse_kernel, system_kernel
from regard.ops.linear.triton_delta.table import (
    APART,
    DECODE_COLUMNS,
    DECODE_UP_TO,
    SCAN_ROWS,
    config,
)
from regard.ops.linear.triton_delta.tokens import tokens_kernel

CHUNK = 64
_PLANES = 5  # of what is known of a token


def padded(channels: int) -> int:
    """The width at which channels are computed: 64 or more.

    Narrower products in bfloat16 came out wrong on an H100 (Triton 3.6), up to illegal accesses.
    """
    least = 16 if interpreting() else 64
    return max(least, 1 << max(channels - 1, 0).bit_length())


def operand(dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """Of products: their type, and the compiler's precision for it.

    float16 has the 11 bits of TF32 but not its range, which unit triangular systems need.
    """
    if dtype == torch.bfloat16 and not interpreting():
        return torch.bfloat16, "ieee"
    exact = precision(half=False)
    if dtype == torch.float16 and exact == "tf32x3":
        return torch.float32, "tf32"
    return torch.float32, exact


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Arguments `<name>b`, `<name>h`, `<name>t`; 0 along an axis that is broadcast."""
    return {name + "bht"[i]: 0 if x.shape[i] == 1 else x.stride(i) for i in range(3)}


def loop_stages(stages: int) -> int:
    """Stages of a loop that says so itself, where `compiled` would not cut them down."""
    return stages if torch.version.hip is None else min(stages, 2)


def channels_last(x: Tensor) -> Tensor:
    """x with its channels side by side, as kernels read them; a copy where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_facts(
    steps: Recording, k: Tensor, log_decay: Tensor | None, unit: bool
) -> tuple[Tensor | None, Tensor]:
    """What kernels read of every token [5, N, chunks * CHUNK], and of its key.

    There is nothing to read where keys neither decay nor are made unit vectors.
    """
    if log_decay is None and not unit:
        return None, k
    B, Hk, T, F = k.shape
    chunks, FP = -(-T // CHUNK), padded(F)
    facts = steps.empty(_PLANES, B * Hk, chunks * CHUNK, dtype=torch.float32, device=k.device)
    near = steps.empty(*k.shape, dtype=k.dtype, device=k.device) if unit else None
    other = {"db": 0, "dh": 0, "dt": 0} if log_decay is None else strides("d", log_decay)
    arguments = {
        "k": k, "log_decay": log_decay, "facts": facts, "near": near, **strides("k", k), **other,
        "T": T, "chunks": chunks, "plane": B * Hk * chunks * CHUNK, "HK": Hk, "F": F, "FP": FP,
        "HAS_DECAY": log_decay is not None, "NORMALISE": unit,
    }  # fmt: skip
    warps = config("tokens", FP, k.dtype != torch.float32).warps
    steps.start(tokens_kernel, B * Hk * chunks, arguments, warps=warps)
    return facts, k if near is None else near


class Effect(NamedTuple):
    """What chunks do to the state, as `system_kernel` leaves it."""

    passing: Tensor
    gain: Tensor
    whole: Tensor


class _Call:
    """One call on its way through the kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
        scale: float, unit: bool,
    ) -> None:  # fmt: skip
        self.steps = Recording()
        self.q, self.k, self.v = channels_last(q), channels_last(k), channels_last(v)
        self.beta, self.log_decay, self.scale, self.unit = beta, log_decay, scale, unit
        (B, self.Hk, self.T, self.F), self.E = k.shape, v.shape[3]
        self.H = q.shape[1]
        self.N, self.chunks = B * self.Hk, -(-self.T // CHUNK)
        self.FP, self.EP = padded(self.F), padded(self.E)
        self.type, self.precision = operand(q.dtype)
        if max(self.FP, self.EP) >= APART and self.type == torch.float32:
            self.precision = precision(half=False)  # TF32 once needs more shared memory there is
        self.half = self.type != torch.float32
        self.facts, self.k = token_facts(self.steps, self.k, log_decay, unit)
        self.scanned = {
            "chunks": self.chunks, "F": self.F, "FP": self.FP, "E": self.E, "EP": self.EP,
            "HAS_DECAY": log_decay is not None, "PRECISION": self.precision,
            "OPERAND": tl.bfloat16 if self.half else tl.float32,
        }  # fmt: skip
        self.shared = Shared.of({
            **self.scanned, "plane": self.N * self.chunks * CHUNK,
            "facts": beta if self.facts is None else self.facts,  # nothing is read of it then
            "T": self.T, "HK": self.Hk, "NORMALISE": unit, "k": self.k,
            "v": self.v, "beta": beta, **strides("k", self.k), **strides("v", self.v),
            **strides("b", beta),
        })  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.steps.empty(*shape, dtype=dtype, device=self.k.device)

    def per_chunk(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(self.N, self.chunks, rows, columns, dtype=dtype)

    def start(self, kernel: Any, name: str, programs: int, arguments: dict[str, Any]) -> None:
        """Starts a kernel that reads the tokens of the call."""
        chosen = config(name, max(self.FP, self.EP), self.half)
        self.steps.start(kernel, programs, arguments, self.shared, *chosen)

    def system(self, clean: bool) -> tuple[Tensor, Effect]:
        """Inverses, and what every chunk does to the state."""
        inverse = self.per_chunk(CHUNK, CHUNK, self.type)
        effect = Effect(
            self.per_chunk(self.FP, self.FP, self.type),
            self.per_chunk(self.EP, self.FP, self.type),
            self.empty(self.N, self.chunks),
        )
        programs, given = self.N * self.chunks, {"inverse": inverse, "CLEAN": clean}
        exact = precision(half=False)
        if self.half and exact == "tf32x3":  # more digits than the inverse is stored with
            exact = "tf32"
        self.start(inverse_kernel, "inverse", programs, {**given, "EXACT": exact})
        self.start(system_kernel, "system", programs, {**given, **effect._asdict()})
        return inverse, effect

    def scan(
        self, effect: Effect, state: Tensor | None, last: Tensor,
        back: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """States before each chunk, and `last`; with `back` the same of gradients, backwards.

        back: the gradient of the last state, what chunks ask for, and where that of the first
        state goes.
        """
        states = self.per_chunk(self.EP, self.FP, self.type)
        rows = min(SCAN_ROWS, self.EP)
        walks = self.N * (self.EP // rows)
        futures = first = gain_back = start_back = None
        if back is not None:
            start_back, gain_back, first = back
            futures = self.per_chunk(self.EP, self.FP, self.type)
        width = max(self.FP, self.EP)
        starts = [(True, False)] if back is None else [(True, True)]
        if back is not None and width >= APART:  # together they need too much shared memory
            starts = [(True, False), (False, True)]
        chosen = config("scan", width, self.half)
        for forward, backward in starts:
            self.steps.start(
                scan_kernel, walks * (forward + backward),
                {**self.scanned, **effect._asdict(), "start": state, "states": states,
                 "last": last, "start_back": start_back, "gain_back": gain_back,
                 "states_back": futures, "last_back": first, "walks": walks, "ROWS": rows,
                 "HAS_START": state is not None, "FORWARD": forward, "BACKWARD": backward,
                 "STAGES": loop_stages(chosen.stages)},
                warps=chosen.warps, stages=chosen.stages, registers=chosen.registers,
            )  # fmt: skip
        return states, futures


_forwards, _backwards, _decodes = Plans(), Plans(), Plans()


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None,
    scale: float, unit: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, E] in q's dtype and the last state, float32; no state is one of zeros."""
    B, H, T, _ = q.shape
    (_, Hk, S, F), E = k.shape, v.shape[3]
    out = torch.empty((B, H, T, E), dtype=q.dtype, device=q.device)
    last = torch.empty((B, Hk, F, E), dtype=torch.float32, device=q.device)
    if S == 0 or k.numel() == 0 or v.numel() == 0:
        if out.numel():
            out.zero_()
        return out, last.zero_() if state is None else last.copy_(state)
    state = None if state is None else state.contiguous()
    tensors = q, k, v, beta, log_decay, state, out, last
    few = T == S <= DECODE_UP_TO
    plans, key = _decodes if few else _forwards, (alike(*tensors[:6]), scale, unit)
    plan = plans.get(key)
    if plan is None:
        plans.keep(key, (_decode if few else _chunked)(*tensors, scale, unit), tensors)
    else:
        plan.run(tensors)
    return out, last


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None,
    out: Tensor, last: Tensor, scale: float, unit: bool,
) -> Recording:  # fmt: skip
    call = _Call(q, k, v, beta, log_decay, scale, unit)
    inverse, effect = call.system(clean=False)
    states, _ = call.scan(effect, state, last)
    if q.shape[2]:
        call.start(
            output_kernel, "output", q.shape[0] * call.H * call.chunks,
            {"q": call.q, **strides("q", call.q), "inverse": inverse, "states": states,
             "out": out, "scale": float(scale), "H": call.H},
        )  # fmt: skip
    return call.steps


def _decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None,
    out: Tensor, last: Tensor, scale: float, unit: bool,
) -> Recording:  # fmt: skip
    q, k, v, steps = channels_last(q), channels_last(k), channels_last(v), Recording()
    (B, H, T, F), Hk, E = q.shape, k.shape[1], v.shape[3]
    blocks = -(-E // DECODE_COLUMNS)
    decays = {"db": 0, "dh": 0, "dt": 0} if log_decay is None else strides("d", log_decay)
    arguments = {
        "q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "start": state,
        "last": last, "out": out, "scale": float(scale), **strides("q", q), **strides("k", k),
        **strides("v", v), **strides("b", beta), **decays, "T": T, "H": H, "HK": Hk, "F": F,
        "FP": padded(F), "E": E, "COLUMNS": DECODE_COLUMNS, "BLOCKS": blocks,
        "HAS_START": state is not None, "HAS_DECAY": log_decay is not None, "NORMALISE": unit,
    }  # fmt: skip
    steps.start(decode_kernel, B * Hk * blocks, arguments, warps=1)
    return steps


def backward(
    d_out: Tensor, d_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    log_decay: Tensor | None, state: Tensor | None, scale: float, unit: bool, wants_decay: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, beta, log_decay (empty where not wanted) and the first state."""
    wants_decay = wants_decay and log_decay is not None

    def like(x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(x.shape, dtype=dtype, device=x.device)

    dq, dk, dv, d_beta = (like(x, x.dtype) for x in (q, k, v, beta))
    shape = tuple(log_decay.shape) if wants_decay and log_decay is not None else (0,)
    d_decay = torch.empty(shape, dtype=torch.float32, device=q.device)
    if k.numel() == 0 or v.numel() == 0:
        return *(x.zero_() for x in (dq, dk, dv, d_beta, d_decay)), d_state.clone()
    state, d_state = None if state is None else state.contiguous(), d_state.contiguous()
    first = torch.empty_like(d_state)
    given = d_out, d_state, q, k, v, beta, log_decay, state
    found = dq, dk, dv, d_beta, d_decay, first
    key = alike(*given), scale, unit, wants_decay
    plan = _backwards.get(key)
    if plan is None:
        _backwards.keep(
            key, _differentiate(*given, *found, scale, unit, wants_decay), (*given, *found)
        )
    else:
        plan.run((*given, *found))
    return found


def _differentiate(
    d_out: Tensor, d_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    log_decay: Tensor | None, state: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    d_beta: Tensor, d_decay: Tensor, first: Tensor, scale: float, unit: bool, wants_decay: bool,
) -> Recording:  # fmt: skip
    call, reads = _Call(q, k, v, beta, log_decay, scale, unit), q.shape[2] > 0
    d_out, programs = channels_last(d_out), call.N * call.chunks
    inverse, effect = call.system(clean=True)
    grads = {
        "q": call.q, "grad": d_out, **strides("q", call.q), **strides("g", d_out),
        "inverse": inverse, "scale": float(scale), "H": call.H,
    }  # fmt: skip
    asked = call.per_chunk(call.EP, call.FP) if reads else torch.zeros_like(effect.gain)
    if reads:
        call.start(asked_kernel, "asked", programs, {**grads, "asked": asked})
    last = call.empty(*d_state.shape)
    states, futures = call.scan(effect, state, last, (d_state, asked, first))
    writes = call.per_chunk(CHUNK, call.EP, call.type)
    d_writes = call.per_chunk(CHUNK, call.EP, call.type)
    d_keys = call.per_chunk(CHUNK, call.FP)
    steps = call.empty(call.N, call.chunks, CHUNK if wants_decay else 0)
    chunked = {
        "states": states,
        "inverse": inverse,
        "d_writes": d_writes,
        "WANTS_DECAY": wants_decay,
    }
    call.start(
        readers_kernel, "readers", programs,
        {**grads, **chunked, "futures": futures, "dq": dq, "writes_out": writes,
         "d_keys_out": d_keys, "steps_out": steps, "READS": reads},
    )  # fmt: skip
    call.start(
        writers_kernel, "writers", programs,
        {**chunked, "writes_in": writes, "d_keys_in": d_keys, "steps_in": steps, "dk": dk,
         "dv": dv, "d_beta": d_beta, "d_decay": d_decay},
    )  # fmt: skip
    return call.steps
