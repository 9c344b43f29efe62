"""From the operands of a call to kernels and back: memory, arguments, grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from regard.gpu import interpreting
from regard.gpu.availability import precision
from regard.gpu.start import Shared, start, together
from regard.ops.local_linear import blockwise
from regard.ops.local_linear.blockwise import empty_result
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.registered import Options
from regard.ops.local_linear.triton import decode, direct
from regard.ops.local_linear.triton.conjugate import conjugate_kernel
from regard.ops.local_linear.triton.forward import mean_kernel, output_kernel
from regard.ops.local_linear.triton.given import given_kernel
from regard.ops.local_linear.triton.prepare import PAD, Prepared, padded, prepare
from regard.ops.local_linear.triton.rescue import rescue_kernel
from regard.ops.local_linear.triton.table import Config, config

TOGETHER = 8  # heads in flight at once
# Heads for which the solve starts along the query, whose product with C comes for little.
START = (64, 128)
RESCUED_ROWS, RESCUED_KEYS = 16, 32  # of a tile in float64
RESCUED_TILES = 8  # that a program looks at
TYPES = {torch.float16: tl.float16, torch.float32: tl.float32}


class Launcher:
    """One call on its way through the kernels."""

    def __init__(self, inputs: Inputs, prepared: Prepared, q: Tensor) -> None:
        self.inputs, self.prepared, self.q = inputs, prepared, q
        B, H, T, D = q.shape
        self.sizes = (B, H, T, D)
        left, right = inputs.visibility.reach
        self.width = max(padded(D), padded(inputs.v.shape[3]))
        bias, decay = prepared.bias, prepared.decay
        high, low, first = decay if decay is not None else (None, None, None)
        per_batch = 1 if bias is None else bias.shape[0] // B
        decay_heads = 1 if high is None else high.shape[0] // B
        self.common: dict[str, Any] = {
            "q": q, "keys": prepared.keys, "sigma": prepared.sigma, "scale": inputs.scale,
            "bias": bias, "high": high, "low": low, "first": first,
            "qb": q.stride(0), "qh": q.stride(1), "qt": q.stride(2),
            "scale_b": step(inputs.scale, 0), "scale_h": step(inputs.scale, 1),
            "T": T, "S": inputs.k.shape[2], "length": prepared.length,
            "left": max(left, 0), "right": max(right, 0), "pairs": B * H,
            "H": H, "HK": inputs.k.shape[1], "BIAS_HEADS": per_batch, "DECAY_HEADS": decay_heads,
            "D": D, "DP": padded(D), "HALF": prepared.half,
            "OPERAND": TYPES[prepared.keys.dtype], "CAUSAL": inputs.causal,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "HAS_BIAS": bias is not None, "HAS_DECAY": decay is not None,
            "PRECISION": precision(prepared.half),
        }
        self.shared = Shared.of(self.common)

    def scratch(self, operands: int = 2) -> Tensor:
        """Memory for operands of every row, in tiles of at most `PAD` queries."""
        B, H, T, D = self.sizes
        rows = PAD * triton.cdiv(T, PAD)
        return self.prepared.keys.new_empty(B * H, operands * rows, padded(D))

    def config(self, kernel: str) -> Config:
        decayed = self.prepared.decay is not None
        scored = self.prepared.bias is not None or decayed
        B, H, T, _ = self.sizes
        tiles, half = B * H * triton.cdiv(T, 64), self.prepared.half
        return config(kernel, self.width, half, interpreting(), scored, tiles, decayed)

    def parts(self, config: Config, high: bool) -> tuple[tuple[bool, tuple[int, int]], ...]:
        """Which tiles [first, last) are computed with 22 bits, and which with 11.

        A row that sees few keys fits them closely, and its rounding does not average out; there
        are few such rows, with little to do.
        """
        tiles = triton.cdiv(self.sizes[2], config.rows)
        if high or not self.prepared.half:
            return ((high, (0, tiles)),)
        few = min(triton.cdiv(rows_of_few_keys(self.inputs), config.rows), tiles)
        return (True, (0, few)), (False, (few, tiles))

    def start(
        self,
        kernel: Any,
        config: Config,
        part: tuple[int, int] | None = None,
        /,
        together: int = TOGETHER,
        **extra: Any,
    ) -> None:
        """Launches a kernel over all tiles of all heads, or over tiles [first, last) of each."""
        B, H, T, _ = self.sizes
        first, last = (0, triton.cdiv(T, config.rows)) if part is None else part
        tiles = last - first
        if tiles <= 0:
            return
        if part is not None:
            extra["skip"] = first
        arguments = dict(extra)
        for name in ("keys", "values"):
            read = name == "keys" or (name in extra and extra.get("AVERAGE", True))
            if config.descriptor and read:
                matrix = getattr(self.prepared, name).flatten(0, 1)
                block = [config.keys, matrix.shape[1]]
                arguments[name] = TensorDescriptor.from_tensor(matrix, block)
        arguments.update(
            M=config.rows, N=config.keys, DESCRIPTOR=config.descriptor, tiles=tiles,
            together=min(together, B * H),
        )
        start(
            kernel, tiles * B * H, arguments, self.shared, config.warps, config.stages,
            config.registers,
        )  # fmt: skip


def rows_of_few_keys(inputs: Inputs) -> int:
    """How many of the first queries see, by position, at most twice as many keys as channels."""
    T, S, few = inputs.q.shape[2], inputs.k.shape[2], 2 * inputs.q.shape[3]
    left, right = inputs.visibility.reach
    if few >= S or (left >= 0 and right >= 0 and left + right < few):
        return T
    return min(max(few - (S - T) - right, 0), T) if right >= 0 else 0


def step(x: Tensor, axis: int) -> int:
    """The stride of an axis that may be broadcast."""
    return 0 if x.shape[axis] == 1 else x.stride(axis)


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """Arguments `<name><axis>` for the axes of an operand, 0 where it is absent or broadcast."""
    return {name + letter: 0 if x is None else step(x, i) for i, letter in enumerate(axes)}


def precise(asked: str, dtype: torch.dtype) -> bool:
    """Whether weights and g get 22 bits where the solve amplifies their rounding, not 11.

    By itself where the inputs have 11 bits of their own.
    """
    return asked == "high" or (asked == "auto" and dtype == torch.float16)


def capturing() -> bool:
    """Whether the device records a graph, and must not be asked anything."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def channels_last(x: Tensor) -> Tensor:
    """x with its channels side by side, as kernels read them; a copy where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Rows:
    """What there is to tell of every query, under construction: [B, H, T] but for the first."""

    out: Tensor  # [B, H, T, Dv]
    slope: Tensor  # [B, H, T, D]
    lse: Tensor
    iterations: Tensor
    residual: Tensor
    top: Tensor  # the highest score, in bits, of the prepared keys
    total: Tensor  # sum of 2^(score - top)
    mean: Tensor  # [B, H, T, D], of the prepared keys; [B, 0] where g is not solved for
    failed: Tensor  # int8

    @classmethod
    def of(cls, inputs: Inputs, solved: bool) -> Rows:
        """Memory for the results of a call."""
        B, H, T, D = inputs.q.shape

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(B, *shape, dtype=dtype, device=inputs.q.device)

        rows = (H, T)
        if inputs.probe is not None:
            slope = inputs.probe.to(torch.float32, copy=True)
        else:
            slope = empty(*rows, D) if solved else empty(*rows, D).zero_()
        iterations, residual = empty(*rows, dtype=torch.int32), empty(*rows)
        if not solved:
            iterations.zero_()
            residual.zero_()
        return cls(
            empty(*rows, inputs.v.shape[3], dtype=inputs.q.dtype), slope, empty(*rows),
            iterations, residual, empty(*rows), empty(*rows), empty(*rows, D) if solved else
            empty(0), empty(*rows, dtype=torch.int8),
        )  # fmt: skip

    def results(self) -> tuple[Tensor, ...]:
        """In the order of the registered op."""
        return (
            self.out, self.slope, self.lse, self.iterations, self.residual,
            self.top, self.total, self.mean,
        )  # fmt: skip


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, ...]:
    """The results of the registered op, then `top`, `total` and `mean` of `Rows`.

    These are empty, [B, 0], after a step of decoding.
    """
    q = channels_last(inputs.q)
    solved = inputs.probe is None and not inputs.average
    if q.numel() == 0 or inputs.k.shape[2] == 0 or inputs.v.shape[3] == 0:
        return _nothing(inputs, solved)
    if decode.serves(inputs) is None:
        return _decode(inputs, options, solved)
    return together(lambda: _kernels(inputs, options, q, solved))


def _kernels(inputs: Inputs, options: Options, q: Tensor, solved: bool) -> tuple[Tensor, ...]:
    """The kernels of a forward, one after the other."""
    D = q.shape[3]
    prepared = prepare(inputs, options.precision)
    launcher, rows = Launcher(inputs, prepared, q), Rows.of(inputs, solved)
    Dv = inputs.v.shape[3]
    values = {"values": prepared.values, "DV": Dv, "DVP": padded(Dv), "out": rows.out}
    weights = {
        "centre": prepared.centre, "overflow": prepared.overflow, "failed": rows.failed,
        "top_out": rows.top, "total_out": rows.total, "lse_out": rows.lse,
        "row_bias": inputs.row_bias, "HAS_ROW_BIAS": inputs.row_bias is not None,
        **strides("row_bias_", inputs.row_bias, "bht"),
    }  # fmt: skip
    high = prepared.half and precise(options.precision, q.dtype)
    if inputs.probe is not None:
        probe = channels_last(inputs.probe)
        launcher.start(
            given_kernel, launcher.config("given"), **values, **weights, probe=probe,
            **strides("g", probe, "bht"), scratch=launcher.scratch(), INTERCEPT=inputs.intercept,
        )
    elif inputs.average:
        launcher.start(
            mean_kernel, launcher.config("average"), **values, **weights, mean=None,
            start_out=None, scratch=launcher.scratch(1), skip=0, AVERAGE=True,
            COLLECT=True, START=False, HIGH=False,
        )
    else:
        both = launcher.scratch()
        if direct.serves(inputs, options) is None:
            direct.fit(
                launcher, high, weights, rows.mean, rows.slope, rows.iterations,
                rows.residual, rows.failed,
            )
        else:
            r = torch.empty_like(rows.slope)
            plain = inputs.key_bias is None and inputs.decay is None
            from_query = launcher.width in START and plain and inputs.intercept and not high
            config = launcher.config("start" if from_query else "mean")
            for precisely, part in launcher.parts(config, high):
                launcher.start(
                    mean_kernel, config, part, **values, **weights, mean=rows.mean,
                    start_out=r, scratch=both, AVERAGE=False, COLLECT=inputs.intercept,
                    START=from_query, HIGH=precisely,
                )
            if not inputs.intercept:
                rows.mean.zero_()
            solve(
                launcher, options.tol, options.solver(D).max_iters, rows.mean, rows.top,
                rows.total, rows.lse, None, rows.slope, r, rows.iterations, rows.residual,
                rows.failed, both, from_query=from_query,
            )
        config = launcher.config("output")
        for precisely, part in launcher.parts(config, high):
            launcher.start(
                output_kernel, config, part, **values, slope=rows.slope, mean=rows.mean,
                top_in=rows.top, total_in=rows.total, failed=rows.failed, scratch=both,
                INTERCEPT=inputs.intercept, HIGH=precisely,
            )
    if solved or prepared.half:
        rescue(launcher, options, rows, solved)
    return rows.results()


def _nothing(inputs: Inputs, solved: bool) -> tuple[Tensor, ...]:
    """What rows without a key give, or a call without rows."""
    result = empty_result(inputs)
    if inputs.probe is not None:
        result.slope.copy_(inputs.probe)
    mean = result.slope if solved else result.slope.new_zeros(inputs.q.shape[0], 0)
    total = torch.zeros_like(result.lse)
    return (*result, result.lse.clone(), total, mean.clone())


def _decode(inputs: Inputs, options: Options, solved: bool) -> tuple[Tensor, ...]:
    """Few queries against many keys: one pass over the cache as it lies."""
    result, failed = decode.decode(inputs, options)
    exact = solved and not decode.half_operands(inputs)
    if exact and options.tol > 0 and not capturing():
        rows = failed != 0
        if bool(rows.any()):
            solver = options.solver(inputs.q.shape[3])
            blockwise.rescue(inputs, solver, options.block_size, result, rows)
    empty = (result.lse.new_empty(inputs.q.shape[0], 0) for _ in range(3))
    return (*result, *empty)


def solve(
    launcher: Launcher,
    tol: float,
    max_iters: int,
    mean: Tensor,
    top: Tensor,
    total: Tensor,
    lse: Tensor,
    goal: Tensor | None,
    x: Tensor,
    r: Tensor,
    iterations: Tensor,
    residual: Tensor,
    failed: Tensor,
    both: Tensor,
    from_query: bool = False,
) -> None:
    """Solves for x [B, H, T, D], in place; see `conjugate_kernel` for `goal` and coordinates.

    `both` is the launcher's `scratch`.
    """
    inputs, prepared = launcher.inputs, launcher.prepared
    launcher.start(
        conjugate_kernel, launcher.config("conjugate"),
        centre=prepared.centre, overflow=prepared.overflow, ridge=inputs.ridge,
        **strides("ridge_", inputs.ridge, "bht"),
        mean=mean, top_in=top, total_in=total, lse_in=lse, goal=goal, x_io=x, r_io=r,
        both_io=both, iterations=iterations, residual=residual, failed=failed, tol=tol,
        limit=max_iters, STARTED=goal is not None, FROM_QUERY=from_query, ABSOLUTE=inputs.absolute,
        INTERCEPT=inputs.intercept,
    )


def rescue(launcher: Launcher, options: Options, rows: Rows, solved: bool) -> None:
    """Computes the rows that failed again, in float64; see `rescue_kernel`."""
    inputs, prepared = launcher.inputs, launcher.prepared
    B, H, T, D = launcher.sizes
    k, v, Dv = channels_last(inputs.k), channels_last(inputs.v), inputs.v.shape[3]
    limit = options.solver(D).max_iters if options.tol == 0 else 4 * D + 64
    shared = (
        "sigma", "scale", "bias", "high", "low", "first", "qb", "qh", "qt", "scale_b", "scale_h",
        "T", "S", "length", "left", "right", "pairs", "H", "HK", "BIAS_HEADS", "DECAY_HEADS",
        "D", "DP", "CAUSAL", "HAS_LEFT", "HAS_RIGHT", "HAS_BIAS", "HAS_DECAY",
    )  # fmt: skip
    tiles = triton.cdiv(T, RESCUED_ROWS * RESCUED_TILES)
    arguments = dict(
        {name: launcher.common[name] for name in shared},
        q=launcher.q, k=k, v=v, key_mask=inputs.key_mask, probe=inputs.probe,
        **strides("k", k, "bhs"), **strides("v", v, "bhs"),
        **strides("m", inputs.key_mask, "bs"), **strides("g", inputs.probe, "bht"),
        **strides("ridge_", inputs.ridge, "bht"), **strides("row_bias_", inputs.row_bias, "bht"),
        centre=prepared.centre, ridge=inputs.ridge, row_bias=inputs.row_bias,
        failed=rows.failed, out=rows.out, slope=rows.slope, lse_io=rows.lse,
        iterations=rows.iterations, residual=rows.residual, top_io=rows.top,
        total_io=rows.total, mean_io=rows.mean, tiles=tiles, tol=options.tol, limit=limit,
        DV=Dv, DVP=padded(Dv), M=RESCUED_ROWS, N=RESCUED_KEYS, TILES=RESCUED_TILES, SOLVED=solved,
        GIVEN=inputs.probe is not None, ABSOLUTE=inputs.absolute, INTERCEPT=inputs.intercept,
        HAS_ROW_BIAS=inputs.row_bias is not None, HAS_MASK=inputs.key_mask is not None,
    )  # fmt: skip
    start(rescue_kernel, tiles * B * H, arguments)
