"""The backward of the engine on a GPU: three passes over the keys, and a second solve.

    cotangent   the right side of the solve (3 products; 4 with it in two short floats)
    conjugate   u, and g from where the forward had left it if the tolerance is much tighter
    queries     dq, the ridge's and the scale's gradient, row data (5 products)
    keys        dk, dv, sums of dS over the queries (8 products)

The formulas are those of the eager form; what is recomputed are the scores, four times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from regard.gpu.start import Shared, start, together
from regard.ops.local_linear.backward import Sums, Wanted, finish, no_sums, rescue
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options
from regard.ops.local_linear.triton.cotangent import cotangent_kernel
from regard.ops.local_linear.triton.forward import mean_kernel
from regard.ops.local_linear.triton.launch import Launcher, capturing, channels_last, solve, step
from regard.ops.local_linear.triton.of_keys import keys_kernel
from regard.ops.local_linear.triton.of_queries import queries_kernel
from regard.ops.local_linear.triton.prepare import LARGEST, PAD, padded, prepare

# The forward's g is solved for again where its tolerance is more than so many times larger.
REFINED_FROM = 4.0
LIFT = 6.0  # of weights in float16, in bits


class Rows:
    """Row data that passes hand on, and the gradients of a call."""

    def __init__(self, launcher: Launcher, sloped: bool) -> None:
        B, H, T, D = launcher.sizes
        prepared, device = launcher.prepared, launcher.q.device
        Dv = launcher.inputs.v.shape[3]
        self.length = -(-T // PAD) * PAD
        pairs, dtype = B * H, prepared.keys.dtype

        def single(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.guard = single(pairs, self.length)
        self.gamma = single(pairs, self.length)
        self.row_data = single(4, pairs, self.length)
        self.tile = launcher.config("queries").rows
        self.tiles = triton.cdiv(T, self.tile)
        self.bounds = single(2, pairs, self.tiles)
        # Rows of queries share theirs with those of slopes, see `queries_kernel`.
        widths = {"q": padded(D) * (2 if sloped else 1), "e": padded(Dv)}
        self.operands = {
            name: torch.empty(pairs, self.length, width, dtype=dtype, device=device)
            for name, width in widths.items()
        }


def backward(
    inputs: Inputs,
    options: Options,
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    extras: tuple[Tensor, ...],
    wanted: Wanted,
) -> tuple[Tensor, ...]:
    """Gradients in the order of `Wanted`; an empty tensor where none is wanted."""
    if inputs.q.numel() == 0 or inputs.k.shape[2] == 0 or inputs.v.shape[3] == 0:
        return finish(inputs, no_sums(inputs, wanted), wanted)

    def passes() -> _Backward:
        call = _Backward(inputs, options, grad, slope, lse, extras, wanted)
        call.cotangent()
        call.solve()
        call.queries()
        call.keys()
        return call

    call = together(passes)
    gradients = finish(inputs, call.sums(), wanted)
    if call.rescued and bool(call.failed.any()):  # the one question to the device
        solver = options.solver(inputs.q.shape[3], backward=True)
        saved = (grad, slope, lse)
        more = rescue(inputs, saved, wanted, solver, options.block_size, call.failed != 0)
        gradients = tuple(x + y for x, y in zip(gradients, more, strict=True))
    return gradients


class _Backward:
    """One call on its way through the kernels."""

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        grad: Tensor,
        slope: Tensor,
        lse: Tensor,
        extras: tuple[Tensor, ...],
        wanted: Wanted,
    ) -> None:
        self.inputs, self.options, self.wanted = inputs, options, wanted
        self.top, self.total, self.mean = extras
        self.slope, self.lse = slope, lse
        self.grad = channels_last(grad)
        prepared = prepare(inputs, options.precision)
        self.launcher = Launcher(inputs, prepared, channels_last(inputs.q))
        half = self.launcher.prepared.half
        self.given = inputs.probe is not None
        self.sloped = not inputs.average
        self.solved = self.sloped and not self.given and wanted.solve
        self.refined = self.solved and options.tol > REFINED_FROM * options.tol_backward
        self.rescued = self.solved and options.tol_backward > 0 and not capturing()
        self.constant = self.solved and (inputs.absolute or inputs.frozen)
        self.high = half and options.precision != "fast"
        self.rows = Rows(self.launcher, self.sloped)
        self.empty = slope.new_zeros(1)
        weighed = self.total.numel() > 0  # a step of decoding saves nothing
        self.scratch = self.empty if weighed and not self.sloped else self.launcher.scratch()
        B, H, T, _ = self.launcher.sizes
        Dv = inputs.v.shape[3]
        self.values = {"values": self.launcher.prepared.values, "DV": Dv, "DVP": padded(Dv)}
        if not weighed:
            self._weigh()
        self.ridge = {
            "ridge": inputs.ridge, "ridge_b": step(inputs.ridge, 0),
            "ridge_h": step(inputs.ridge, 1), "ridge_t": step(inputs.ridge, 2),
            "ABSOLUTE": inputs.absolute, "INTERCEPT": inputs.intercept,
            "centre": self.launcher.prepared.centre,
            "top_in": self.top, "total_in": self.total, "lse_in": lse,
            "row_length": self.rows.length,
        }
        self.failed = torch.zeros(B, H, T, dtype=torch.int8, device=slope.device)
        self.failed_g = self.failed.clone() if self.refined else self.failed

    def _weigh(self) -> None:
        """top, total and mean once more."""
        inputs, launcher = self.inputs, self.launcher
        self.top, self.total = (torch.empty_like(self.lse) for _ in range(2))
        self.mean = torch.zeros_like(self.slope)
        launcher.start(
            mean_kernel, launcher.config("mean"), **self.values, centre=launcher.prepared.centre,
            overflow=launcher.prepared.overflow, row_bias=None, row_bias_b=0, row_bias_h=0,
            row_bias_t=0, HAS_ROW_BIAS=False, out=self.empty, mean=self.mean, top_out=self.top,
            total_out=self.total, lse_out=torch.empty_like(self.lse),
            failed=torch.empty_like(self.lse, dtype=torch.int8), AVERAGE=False,
            start_out=None, scratch=self.scratch, skip=0,
            COLLECT=inputs.intercept, START=False, HIGH=self.high,
        )

    def _like_slope(self, needed: bool) -> Tensor:
        return torch.empty_like(self.slope, dtype=torch.float32) if needed else self.empty

    def cotangent(self) -> None:
        """Rows of e; x and r of the solve for u, and of the one for g."""
        right = self.solved or (self.given and self.wanted.solve)
        self.u, self.right = self._like_slope(right), self._like_slope(right)
        self.goal = torch.empty_like(self.top) if right else self.empty
        self.g = self._like_slope(self.refined)
        self.rest = self._like_slope(self.refined or self.given)
        self.goal_g = torch.empty_like(self.top) if self.refined else self.empty
        grad = self.grad
        kernel = "cotangent_two" if self.refined or self.given else "cotangent"
        self.launcher.start(
            cotangent_kernel, self.launcher.config(kernel), **self.values, **self.ridge,
            grad=grad, eb=grad.stride(0), eh=grad.stride(1), et=grad.stride(2),
            mean=self.mean, slope=self.slope, e_rows=self.rows.operands["e"],
            guard_out=self.rows.guard, gamma_out=self.rows.gamma, x_out=self.u,
            r_out=self.right, goal_out=self.goal, g_out=self.g, rest_out=self.rest,
            goal_g_out=self.goal_g, SOLVE=right, MEAN=self.given, REFINE=self.refined,
            HIGH=self.high,
        )
        if self.given:
            self.mean = self.rest

    def solve(self) -> None:
        """u, and g again."""
        if not self.solved:
            return
        D, tol = self.launcher.sizes[3], self.options.tol_backward
        iterations, residual = torch.empty_like(self.top, dtype=torch.int32), self.goal.clone()
        limit = self.options.solver(D, backward=True).max_iters
        systems = [(self.goal, self.u, self.right, self.failed)]
        if self.refined:
            systems.append((self.goal_g, self.g, self.rest, self.failed_g))
        for goal, x, r, failed in systems:
            solve(
                self.launcher, tol, limit, self.mean, self.top, self.total, self.lse, goal,
                x, r, iterations, residual, failed, self.scratch,
            )

    def queries(self) -> None:
        """dq and the row data of the last pass."""
        B, H, T, D = self.launcher.sizes
        rows, like, prepared = self.rows, self.slope, self.launcher.prepared
        self.grad_q = torch.empty(B, H, T, D, dtype=self.inputs.q.dtype, device=like.device)
        self.of_rows = torch.empty(3, B, H, T, dtype=torch.float32, device=like.device)
        self.grad_probe = self._like_slope(self.given)
        shape = (B * H, rows.length, padded(D)) if self.solved else (1,)
        rows.operands["u"] = prepared.keys.new_empty(shape)
        self.launcher.start(
            queries_kernel, self.launcher.config("queries"), **self.values, **self.ridge,
            mean=self.mean, slope=self.g if self.refined else self.slope, solution=self.u,
            failed=self.failed, failed_g=self.failed_g, right_side=self.right,
            e_rows=rows.operands["e"], guard_in=rows.guard, gamma_in=rows.gamma,
            grad_q=self.grad_q, grad_ridge=self.of_rows[0], grad_scale=self.of_rows[1],
            grad_row=self.of_rows[2], grad_probe=self.grad_probe,
            q_rows=rows.operands["q"], u_rows=rows.operands["u"], row_data=rows.row_data,
            bounds=rows.bounds, scratch=self.scratch, ROWS=self.launcher.config("keys").rows,
            overflow=prepared.overflow, SLOPE=self.sloped, SOLVED=self.solved, REFINED=self.refined,
            BALANCED=self.sloped and self.inputs.intercept and not self.constant,
            CONSTANT=self.constant, RESCUED=self.rescued, LOOP=self.wanted.solve, LIMIT=LARGEST,
        )

    def keys(self) -> None:
        """dk, dv and the sums of dS over the queries."""
        inputs, wanted, rows, prepared = self.inputs, self.wanted, self.rows, self.launcher.prepared
        B, Hk, S, D = inputs.k.shape
        H, Dv = inputs.q.shape[1], inputs.v.shape[3]
        column = wanted.key_bias or wanted.decay
        of_keys = wanted.k or column
        device = self.slope.device

        def target(needed: bool, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape if needed else (1,), dtype=dtype, device=device)

        self.grad_k = target(of_keys, inputs.k.dtype, B, Hk, S, D)
        self.grad_v = target(wanted.v, inputs.v.dtype, B, Hk, S, Dv)
        self.grad_column = target(column, torch.float32, B, H, S)
        if not (of_keys or wanted.v):
            return
        config = self.launcher.config("keys")
        known: dict[str, Any] = {
            **self.launcher.common, **self.values, "q_rows": rows.operands["q"],
            "e_rows": rows.operands["e"], "u_rows": rows.operands["u"], "row_data": rows.row_data,
            "bounds": rows.bounds, "grad_k": self.grad_k,
            "grad_v": self.grad_v, "grad_column": self.grad_column,
            "row_length": rows.length, "row_tiles": rows.tiles, "TILE": rows.tile,
            "SLOPE": self.sloped,
            "SOLVED": self.solved, "OF_KEYS": of_keys, "OF_VALUES": wanted.v, "COLUMN": column,
            "LIFT": LIFT if prepared.half else 0.0, "M": config.rows, "N": config.keys,
        }
        arguments = {name: known[name] for name in keys_kernel.arg_names}
        programs = triton.cdiv(S, config.keys) * B * Hk
        cut = (config.warps, config.stages, config.registers)
        start(keys_kernel, programs, arguments, Shared({}, ()), *cut)

    def sums(self) -> Sums:
        """What was found, in the shapes in which the eager form sums."""
        row = self.of_rows[2]
        if self.wanted.decay or self.wanted.row_bias:
            row = row.double() if self.constant else torch.zeros_like(row, dtype=torch.float64)
        return Sums(
            self.grad_q, self.grad_k, self.grad_v, self.of_rows[0], self.of_rows[1],
            self.grad_column.double(), row, self.grad_probe,
        )
