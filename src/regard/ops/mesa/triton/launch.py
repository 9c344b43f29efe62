"""From the operands of a call to the kernels and back. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from regard.gpu import interpreting
from regard.gpu.availability import precision
from regard.gpu.replay import Plans, Recording, alike
from regard.ops.linear.triton_delta.launch import (
    CHUNK,
    channels_last,
    loop_stages,
    operand,
    padded,
    strides,
    token_facts,
)
from regard.ops.mesa.triton.solve import solve_kernel
from regard.ops.mesa.triton.sums import scan_kernel, segments_kernel, sums_kernel
from regard.ops.mesa.triton.table import BLOCK, LENGTH, SPLIT, config


class Sums(NamedTuple):
    """Both sums before every chunk, as the solve reads them."""

    keys: Tensor  # [N, chunks, DP, DP]
    rest: Tensor | None  # what rounding left of it
    values: Tensor | None  # [N, chunks, DP, EP]


class _Call:
    """One call on its way through the kernels; its queries are q, or gradients in their place."""

    def __init__(self, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
        self.steps = Recording()
        self.k, self.v, self.beta = channels_last(k), channels_last(v), beta
        (self.B, self.Hk, self.T, self.D), self.E = k.shape, v.shape[3]
        self.N, self.chunks = self.B * self.Hk, -(-self.T // CHUNK)
        self.DP, self.EP = padded(self.D), padded(self.E)
        self.width = max(self.DP, self.EP)
        self.type, exact = operand(k.dtype)
        if self.type == torch.float32:  # what TF32 loses of the sums, their inverse multiplies
            exact = precision(half=False)
        self.half = self.type != torch.float32
        facts, _ = token_facts(self.steps, self.k, log_decay, False)
        self.common: dict[str, Any] = {
            "k": self.k, "v": self.v, "beta": beta, "facts": beta if facts is None else facts,
            **strides("k", self.k), **strides("v", self.v), **strides("b", beta), "T": self.T,
            "chunks": self.chunks, "plane": self.N * self.chunks * CHUNK,
            "HK": self.Hk, "D": self.D, "DP": self.DP, "E": self.E, "EP": self.EP,
            "HAS_DECAY": log_decay is not None, "SPLIT": self.half and SPLIT, "PRECISION": exact,
            "OPERAND": tl.bfloat16 if self.half else tl.float32,
        }  # fmt: skip

    def per_chunk(self, columns: int) -> Tensor:
        shape = (self.N, self.chunks, self.DP, columns)
        return self.steps.empty(*shape, dtype=self.type, device=self.k.device)

    def sums(
        self, past_keys: Tensor | None, past_values: Tensor | None, last_keys: Tensor,
        last_values: Tensor | None,
    ) -> Sums:  # fmt: skip
        """The sums before every chunk; those after all keys go to the last arguments.

        Without `last_values` those of keys alone.
        """
        values, split = last_values is not None, self.common["SPLIT"]
        given = {name: x for name, x in self.common.items() if name != "SPLIT"}
        segments, scan = -(-self.chunks // LENGTH), config("scan", self.width, self.half)
        parts = self.N * segments
        given |= {"segments": segments, "length": LENGTH, "key_parts": parts, "VALUES": values}
        starts = {"start_k": past_keys, "start_v": past_values, "HAS_START": past_keys is not None}
        if segments > 1:
            gains = self._gains(given, values, segments)
            key_parts = self.N * (self.DP * self.DP // BLOCK)
            value_parts = self.N * (self.DP * self.EP // BLOCK) if values else 0
            names = "D", "DP", "E", "EP", "HAS_DECAY", "VALUES", "segments"
            self._start(scan_kernel, "scan", key_parts + value_parts, {
                **{name: given[name] for name in names}, **gains, **starts,
                "key_parts": key_parts, "BLOCK": BLOCK, "STAGES": loop_stages(scan.stages),
            })  # fmt: skip
        else:
            gains = {"gain_k": None, "gain_v": None}
        found = Sums(
            self.per_chunk(self.DP), self.per_chunk(self.DP) if split else None,
            self.per_chunk(self.EP) if values else None,
        )  # fmt: skip
        gains.pop("whole", None)
        self._start(sums_kernel, "sums", parts * (1 + values), {
            **given, **gains, **starts, "keys_sum": found.keys, "keys_rest": found.rest,
            "values_sum": found.values, "last_k": last_keys, "last_v": last_values,
            "SPLIT": split, "SCANNED": segments > 1,
        })  # fmt: skip
        return found

    def _gains(self, given: dict[str, Any], values: bool, segments: int) -> dict[str, Any]:
        """What segments but the last add."""
        room = {"dtype": torch.float32, "device": self.k.device}
        shape = self.N, segments, self.DP
        gains = {
            "gain_k": self.steps.empty(*shape, self.DP, **room),
            "gain_v": self.steps.empty(*shape, self.EP, **room) if values else None,
            "whole": self.steps.empty(self.N, segments, **room),
        }
        parts = self.N * (segments - 1)
        self._start(
            segments_kernel, "segments", parts * (1 + values),
            {**given, **gains, "key_parts": parts},
        )  # fmt: skip
        return gains

    def _start(self, kernel: Any, name: str, programs: int, arguments: dict[str, Any]) -> None:
        chosen = config(name, self.width, self.half)
        self.steps.start(
            kernel, programs, arguments, warps=chosen.warps, stages=chosen.stages,
            registers=chosen.registers,
        )  # fmt: skip

    def solve(
        self, q: Tensor, sums: Sums, ridge: Tensor, tol: float, limit: int, x: Tensor,
        out: Tensor | None, counts: Tensor,
    ) -> None:  # fmt: skip
        """Fills x, the solution of every query, counts, the steps of each tile, and out."""
        q = channels_last(q)
        H = q.shape[1]
        self._start(solve_kernel, "solve", self.B * H * self.chunks, {
            **self.common, "q": q, **strides("q", q), "keys_sum": sums.keys,
            "keys_rest": sums.rest, "values_sum": sums.values, "ridge": ridge, "x_out": x,
            "out": out, "steps_out": counts, "tol": float(tol), "limit": limit, "H": H,
            "RIDGES": ridge.shape[1], "READS": out is not None,
            "SHORTCUT": self.half or interpreting(),  # twice the code, too much in float32
        })  # fmt: skip


def _limit(limit: int, channels: int) -> int:
    return limit or 2 * channels + 8


_forwards, _solves = Plans(), Plans()


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    past_keys: Tensor | None, past_values: Tensor | None, ridge: Tensor, tol: float, limit: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out [B, H, T, E], x [B, H, T, D], both sums after all keys, steps [B, H, chunks]."""
    (B, H, T, D), Hk, E = q.shape, k.shape[1], v.shape[3]
    out = torch.empty((B, H, T, E), dtype=q.dtype, device=q.device)
    x = torch.empty((B, H, T, D), dtype=torch.float32, device=q.device)
    counts = torch.empty((B, H, -(-T // CHUNK)), dtype=torch.int32, device=q.device)
    last_k = torch.empty((B, Hk, D, D), dtype=torch.float32, device=q.device)
    last_v = torch.empty((B, Hk, D, E), dtype=torch.float32, device=q.device)
    past_k = None if past_keys is None else past_keys.contiguous()
    past_v = None if past_values is None else past_values.contiguous()
    if T == 0 or k.numel() == 0 or v.numel() == 0:
        for before, after in ((past_k, last_k), (past_v, last_v)):
            after.zero_() if before is None else after.copy_(before)
        return out.zero_(), x.zero_(), last_k, last_v, counts.zero_()
    ridge = ridge.contiguous()
    given = q, k, v, beta, log_decay, past_k, past_v, ridge
    tensors = *given, out, x, last_k, last_v, counts
    key = alike(*given), tol, limit
    plan = _forwards.get(key)
    if plan is None:
        call = _Call(k, v, beta, log_decay)
        sums = call.sums(past_k, past_v, last_k, last_v)
        call.solve(q, sums, ridge, tol, _limit(limit, D), x, out, counts)
        _forwards.keep(key, call.steps, tensors)
    else:
        plan.run(tensors)
    return out, x, last_k, last_v, counts


def solve(
    right: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, past_keys: Tensor | None,
    ridge: Tensor, tol: float, limit: int,
) -> Tensor:  # fmt: skip
    """(Hkk_t + R)^-1 right, float32: the second solve, of the backward."""
    (B, H, _, D), chunks = right.shape, -(-k.shape[2] // CHUNK)
    x = torch.empty(right.shape, dtype=torch.float32, device=right.device)
    if right.numel() == 0:
        return x
    past, ridge = None if past_keys is None else past_keys.contiguous(), ridge.contiguous()
    given = right, k, beta, log_decay, past, ridge
    key = alike(*given), tol, limit
    plan = _solves.get(key)
    if plan is None:
        call = _Call(k, k, beta, log_decay)
        room = {"dtype": torch.float32, "device": right.device}
        shape = *k.shape[:2], D, D
        last = call.steps.empty(*shape, **room)
        counts = call.steps.empty(B, H, chunks, dtype=torch.int32, device=right.device)
        sums = call.sums(past, None, last, None)
        call.solve(right, sums, ridge, tol, _limit(limit, D), x, None, counts)
        _solves.keep(key, call.steps, (*given, x))
    else:
        plan.run((*given, x))
    return x
