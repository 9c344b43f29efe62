"""A few query rows against a long cache: one call of C, with as little Python as can be.

Where nothing is traced and nothing needs a gradient, a decoding step goes to C directly
(`decode`); otherwise through the registered op, whose forward comes here as well (`forward`).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from regard.core.decay import decay_sums
from regard.core.watched import PLAIN, is_watched
from regard.native import chosen, function, no_memory
from regard.ops.local_linear import blockwise
from regard.ops.local_linear.blockwise import Result
from regard.ops.local_linear.call import OP, Answer, Call, operands, options, ridge_rows
from regard.ops.local_linear.layout import Inputs
from regard.ops.local_linear.native.library import AVERAGE, GIVEN, SOLVED
from regard.ops.local_linear.registered import Options, inputs_of
from regard.ops.local_linear.solve import Solver, wants_precision

MOST_ROWS = 8  # queries x group: up to here half the time of a tile or less, measured
LEAST_WORK = 1 << 21  # numbers in all keys below which a second thread costs more than it saves
_CALL = struct.Struct("=20q d 66q 7q")  # `Call` of call.h: integers, tol, 11 operands, 7 results
_NONE = (0, 0, 0, 0, 0, 0)
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether so few rows share a key head that a tile would be empty."""
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    return 0 < rows <= MOST_ROWS and q.shape[0] > 0 and k.shape[2] > 0


def needs_gradient(call: Call) -> bool:
    """Whether autograd will come back to a call."""
    if not torch.is_grad_enabled():
        return False
    tensors = (
        call.q, call.k, call.v, call.ridge, call.scale, call.key_bias, call.log_decay,
        call.row_bias, call.probe, None if call.decay is None else call.decay.sums,
    )  # fmt: skip
    return any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def untraced(call: Call) -> bool:
    """Whether a call may leave torch: no gradient is needed and nobody looks on."""
    return not (
        is_watched()
        or not {type(call.q), type(call.k), type(call.v)} <= PLAIN
        or call.q.device.type != "cpu"
        or needs_gradient(call)
    )


def decode(call: Call, direct: bool) -> Answer:
    """The answer of a call with dot scores that `serves` and is `untraced`."""
    q, D = call.q, call.q.shape[3]
    decay = call.decay
    if decay is None and call.log_decay is not None:
        decay = decay_sums(call.log_decay, call.key_mask)
    ridge = call.ridge
    ridge = ridge_rows(call, torch.float32) if isinstance(ridge, Tensor) else float(ridge)
    scale = D**-0.5 if call.scale is None else call.scale
    scale = scale.float()[None] if isinstance(scale, Tensor) else float(scale)
    left, right = call.window if call.window is not None else (-1, -1)
    precise = wants_precision(direct, call.tol)
    solver = Solver(direct, call.tol, call.max_iters or 2 * D + 8, precise)
    mode = AVERAGE if call.average else SOLVED if call.probe is None else GIVEN
    result, failed = _run(
        q, call.k, call.v, ridge, scale, call.key_mask, call.key_bias, decay, call.row_bias,
        call.probe, left, 0 if call.causal else right, call.causal, call.intercept,
        call.ridge_mode == "absolute", mode, solver,
    )  # fmt: skip
    if failed is not None and solver.rescues(torch.float32):
        inputs = inputs_of(operands(call), options(call, direct))
        blockwise.rescue(inputs, solver, call.block_size, result, failed)
    return result.out, result.lse, result.slope, result.iterations, result.residual


def forward(inputs: Inputs, options: Options) -> Result:
    """The results of the registered op."""
    left, right = inputs.visibility.reach
    solver = options.solver(inputs.q.shape[3])
    mode = AVERAGE if inputs.average else SOLVED if inputs.probe is None else GIVEN
    result, failed = _run(
        inputs.q, inputs.k, inputs.v, inputs.ridge, inputs.scale, inputs.key_mask,
        inputs.key_bias, inputs.decay, inputs.row_bias, inputs.probe, left, right, inputs.causal,
        inputs.intercept, inputs.absolute, mode, solver,
    )  # fmt: skip
    if failed is not None and solver.rescues(torch.float32):
        blockwise.rescue(inputs, solver, options.block_size, result, failed)
    return result


def _run(
    q: Tensor, k: Tensor, v: Tensor, ridge: float | Tensor, scale: float | Tensor,
    key_mask: Tensor | None, key_bias: Tensor | None, decay: tuple[Tensor, Tensor] | None,
    row_bias: Tensor | None, probe: Tensor | None, left: int, right: int, causal: bool,
    intercept: bool, absolute: bool, mode: int, solver: Solver,
) -> tuple[Result, Tensor | None]:  # fmt: skip
    """The result, and which rows [B, H, T] failed if any did."""
    B, H, T, D = q.shape
    Hk, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    if k.stride(3) != 1:
        k = k.contiguous()
    if v.stride(3) != 1:
        v = v.contiguous()
    probe, key_bias, row_bias = map(_float32, (probe, key_bias, row_bias))
    sums, first = (None, None) if decay is None else decay
    ridges, scales = _pointed(ridge), _pointed(scale)
    rows, kind = (B, H, T), torch.float32
    out, slope = q.new_empty(*rows, Dv, dtype=kind), q.new_empty(*rows, D, dtype=kind)
    lse, residual = q.new_empty(rows, dtype=kind), q.new_empty(rows, dtype=kind)
    iterations = q.new_empty(rows, dtype=torch.int32)
    flags = (ctypes.c_uint8 * (B * H * T))()
    packed = _CALL.pack(
        B, H, Hk, T, S, D, Dv,
        0 if key_bias is None else key_bias.shape[1], 0 if sums is None else sums.shape[1],
        left, right, causal, (left, right) != (-1, -1), intercept, absolute, mode, solver.direct,
        solver.precise, solver.max_iters,
        torch.get_num_threads() if B * Hk * S * D >= LEAST_WORK else 1, solver.tol,
        *_matrix(q), *_matrix(k), *_matrix(v), *(_NONE if probe is None else _matrix(probe)),
        *_rows(ridges), *_rows(scales), *_mask(key_mask), *_rows(key_bias), *_rows(sums),
        *_rows(first), *_rows(row_bias),
        out.data_ptr(), slope.data_ptr(), lse.data_ptr(), iterations.data_ptr(),
        residual.data_ptr(), ctypes.addressof(flags), 0,
    )  # fmt: skip
    count = _kernel(chosen())(packed)
    if count < 0:
        raise no_memory(OP)
    if mode == GIVEN and probe is not None:
        slope.copy_(probe)
    elif mode == AVERAGE:
        slope.zero_()
    result = Result(out.to(q.dtype), slope, lse, iterations, residual)
    failed = q.new_tensor(list(flags), dtype=torch.bool).view(rows) if count else None
    return result, failed


def _pointed(x: float | Tensor) -> ctypes.c_float | Tensor:
    """A number where C can point to it, as the only element of an operand without axes."""
    return x if isinstance(x, Tensor) else ctypes.c_float(x)


def _float32(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.float()


def _matrix(x: Tensor) -> tuple[int, ...]:
    """`Operand` of a tensor [B, H, T, D]."""
    return (x.data_ptr(), *x.stride(), _KINDS[x.dtype])


def _rows(x: Tensor | ctypes.c_float | None) -> tuple[int, ...]:
    """`Operand` of a tensor [B | 1, H | 1] or [B | 1, H | 1, T | 1], or of one number."""
    if x is None:
        return _NONE
    if not isinstance(x, Tensor):
        return (ctypes.addressof(x), 0, 0, 0, 0, 0)
    strides = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return (x.data_ptr(), *strides, *(0,) * (5 - len(strides)))


def _mask(x: Tensor | None) -> tuple[int, ...]:
    """`Operand` of a tensor [B, S]."""
    return _NONE if x is None else (x.data_ptr(), x.stride(0), 0, x.stride(1), 0, 0)


@cache
def _kernel(isa: str | None) -> Callable[[bytes], int]:
    """The kernel of the best instruction set, or of one, for the bytes of a `Call`."""
    size = function(OP, "local_linear_call_size", isa)
    size.restype, size.argtypes = ctypes.c_int64, []
    if size() != _CALL.size:
        raise RuntimeError(f"{OP}: call.h and decode.py disagree about the size of a call")
    run = function(OP, "local_linear_decode", isa)
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    return run
