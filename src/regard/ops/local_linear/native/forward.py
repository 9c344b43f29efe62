"""From the operands of the registered op to a call of C, and back to its results."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.native import chosen, no_memory
from regard.ops.local_linear import blockwise
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.native import decode
from regard.ops.local_linear.native.library import AVERAGE, GIVEN, SOLVED, Call, kernel, operand
from regard.ops.local_linear.registered import Options
from regard.ops.local_linear.solve import Solver

OP = "local_linear_attention"
# Pairs of a query and a key, times channels, from which a second thread is worth its 30 us: about
# a millisecond of work, of which a solve has ten times as much per pair.
LEAST_WORK = {SOLVED: 1 << 22, GIVEN: 1 << 25, AVERAGE: 1 << 25}


def forward(inputs: Inputs, options: Options) -> Sequence[Tensor]:
    """The results of the registered op."""
    if decode.serves(inputs.q, inputs.k):
        return decode.forward(inputs, options)
    return _forward(inputs, options, None)


def forward_keeping(inputs: Inputs, options: Options) -> Sequence[Tensor]:
    """The same, and the Cholesky factors of a direct solve for the backward."""
    factors = inputs.q.new_empty(factors_shape(inputs), dtype=torch.float32)
    return (*_forward(inputs, options, factors), factors)


def factors_shape(inputs: Inputs) -> tuple[int, ...]:
    """The lower triangle of every query."""
    B, H, T, D = inputs.q.shape
    return B, H, T, D * (D + 1) // 2


def _forward(inputs: Inputs, options: Options, factors: Tensor | None) -> blockwise.Result:
    q, S = inputs.q, inputs.k.shape[2]
    if q.numel() == 0 or S == 0:
        result = blockwise.empty_result(inputs)
        if inputs.probe is not None:
            result.slope.copy_(inputs.probe)
        return result
    solver = options.solver(q.shape[3])
    # Not filled here: torch would do so with threads of its own, which then spin for
    # milliseconds on the cores that ours want.
    rows, full = q.shape[:3], torch.float32
    result = blockwise.Result(
        q.new_empty(*rows, inputs.v.shape[3]), q.new_empty(q.shape, dtype=full),
        q.new_empty(rows, dtype=full), q.new_zeros(rows, dtype=torch.int32),
        q.new_zeros(rows, dtype=full),
    )  # fmt: skip
    out = result.out
    if out.dtype != torch.float32:
        out = torch.empty_like(out, dtype=torch.float32)
    failed = q.new_zeros(q.shape[:3], dtype=torch.bool)
    call, kept = call_of(inputs, solver)
    call.out, call.slope, call.lse = out.data_ptr(), result.slope.data_ptr(), result.lse.data_ptr()
    call.iterations, call.residual = result.iterations.data_ptr(), result.residual.data_ptr()
    call.failed = failed.data_ptr()
    if factors is not None:
        call.factors = factors.data_ptr()
    run(call, "forward")
    del kept
    if out is not result.out:
        result.out.copy_(out)
    if call.mode == SOLVED and solver.rescues(inputs.dtype) and bool(failed.any()):
        blockwise.rescue(inputs, solver, options.block_size, result, failed)
    return result


def run(call: Call, name: str) -> None:
    """Calls `regard_local_linear_<name>`; out of memory is a `MemoryError`."""
    if kernel(OP, name, chosen())(ctypes.byref(call)):
        raise no_memory(OP)


def call_of(inputs: Inputs, solver: Solver) -> tuple[Call, list[Tensor]]:
    """All but the results of a call, and the tensors that must live as long as it does."""
    kept: list[Tensor] = []

    def of(x: Tensor | None, axes: str, *dtypes: torch.dtype) -> object:
        if x is None:
            return operand(None, axes)
        x = x.detach()
        if x.dtype not in dtypes:
            x = x.to(dtypes[0])
        kept.append(x)
        return operand(x, axes)

    q, k, v = inputs.q, inputs.k, inputs.v
    B, H, T, D = q.shape
    sees = inputs.visibility
    left, right = (min(x, T + k.shape[2]) for x in sees.reach)  # farther, nothing is to be seen
    mode = AVERAGE if inputs.average else SOLVED if inputs.probe is None else GIVEN
    data, full = (torch.float32, torch.bfloat16, torch.float16), (torch.float32,)
    sums, first = inputs.decay if inputs.decay is not None else (None, None)
    call = Call(
        batch=B, heads=H, key_heads=k.shape[1], queries=T, keys=k.shape[2], channels=D,
        value_channels=v.shape[3],
        bias_heads=inputs.key_bias.shape[1] if inputs.key_bias is not None else 0,
        decay_heads=sums.shape[1] if sums is not None else 0,
        left=left, right=right, causal=inputs.causal, banded=(left, right) != (-1, -1),
        intercept=inputs.intercept, absolute=inputs.absolute, mode=mode,
        direct=solver.direct, precise=solver.precise, max_iters=solver.max_iters, tol=solver.tol,
        q=of(q, "bhrc", *data), k=of(k, "bhrc", *data), v=of(v, "bhrc", *data),
        probe=of(inputs.probe, "bhrc", *full),
        ridge=of(inputs.ridge.expand(B, H, T), "bhr", *full),
        scale=of(inputs.scale.expand(B, H), "bh", *full),
        key_mask=of(inputs.key_mask, "br", torch.bool),
        key_bias=of(inputs.key_bias, "bhr", *full),
        decay_sums=of(sums, "bhr", torch.float64),
        decay_first=of(first, "bhr", torch.int64),
        row_bias=of(inputs.row_bias, "bhr", *full),
    )  # fmt: skip
    pairs = B * H * T * k.shape[2] // (2 if inputs.causal else 1)
    call.threads = torch.get_num_threads() if pairs * D >= LEAST_WORK[mode] else 1
    return call, kept
