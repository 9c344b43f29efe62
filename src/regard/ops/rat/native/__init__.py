"""The native form: plain C on CPUs, see `regard.native`. The files, C and Python:

- `call.h`, `library.py`: what a kernel is told
- `scan.c`: the average inside of chunks, forward and backward
- `ends.h`, `forward.c`, `backward.c`: attention over chunk ends and the running key
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.native import refusal
from regard.ops.rat.attend import Inputs
from regard.ops.rat.native.library import Backward, Call, Scan, dense, rows, run
from regard.ops.rat.registered import register_attend, register_scan

# Numbers from which a second thread is worth its 30 us: of a scan, and of products.
LEAST_SCANNED, LEAST_PRODUCTS = 1 << 20, 1 << 24


def refuse(q: Tensor) -> str | None:
    """Why the native form cannot serve a call with these queries, or None."""
    if q.device.type not in ("cpu", "meta"):
        return f"it runs on a CPU, not on {q.device.type}"
    if q.dtype == torch.float64:
        return "it computes in float32"
    return refusal()


def _scan(like: Tensor, chunk: int, **fields: Any) -> Scan:
    B, H, n, D = like.shape
    threads = torch.get_num_threads() if like.numel() >= LEAST_SCANNED else 1
    return Scan(
        batch=B, heads=H, places=n, channels=D, chunk=min(chunk, max(n, 1)), threads=threads,
        **fields,
    )  # fmt: skip


def scan_forward(x: Tensor, gate: Tensor, carry: Tensor, chunk: int) -> Tensor:
    """h of every place."""
    x, gate, carry = dense(x), dense(gate), carry.contiguous()
    h = x.new_empty(x.shape)
    fields = {"x": rows(x), "gate": rows(gate), "carry": carry.data_ptr(), "out": h.data_ptr()}
    run("scan_forward", _scan(x, chunk, **fields))
    return h


def scan_backward(
    grad: Tensor, h: Tensor, x: Tensor, gate: Tensor, carry: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and carry."""
    grad, h, x, gate, carry = dense(grad), dense(h), dense(x), dense(gate), carry.contiguous()
    found = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(carry.shape)
    names = ("d_x", "d_gate", "d_carry")
    fields = {name: y.data_ptr() for name, y in zip(names, found, strict=True)}
    operands = {"x": rows(x), "gate": rows(gate), "result": rows(h), "grad": rows(grad)}
    run("scan_backward", _scan(x, chunk, carry=carry.data_ptr(), **operands, **fields))
    return found


def _call(given: Inputs) -> tuple[Call, list[Tensor]]:
    """All but the results of a call, and the tensors that must live as long as it does."""
    q, k, v = dense(given.q), dense(given.k), dense(given.v)
    past_k, past_v = given.past_k.contiguous(), given.past_v.contiguous()
    kept = [q, k, v, past_k, past_v]
    (B, H, T, D), (_, Hk, n, _), past = q.shape, k.shape, past_k.shape[2]

    def pointer(x: Tensor | None, dtype: torch.dtype) -> tuple[int | None, int]:
        if x is None:
            return None, 0
        x = x.to(dtype).contiguous()
        kept.append(x)
        return x.data_ptr(), len(x)

    place, place_rows = pointer(given.place, torch.int32)
    count, count_rows = pointer(given.past_count, torch.int32)
    cosine, table_rows = pointer(given.cosine, torch.float32)
    sine, _ = pointer(given.sine, torch.float32)
    products = B * H * T * (past + given.finished // 2 + 1) * D
    threads = torch.get_num_threads() if products >= LEAST_PRODUCTS else 1
    call = Call(
        batch=B, heads=H, key_heads=Hk, queries=T, places=n, channels=D,
        chunk=min(given.chunk, max(n, 1)), threads=threads, past=past, offset=given.offset,
        place_rows=place_rows, count_rows=count_rows, table_rows=table_rows, scale=given.scale,
        q=rows(q), k=rows(k), v=rows(v), past_k=past_k.data_ptr(), past_v=past_v.data_ptr(),
        place=place, past_count=count, cosine=cosine, sine=sine,
    )  # fmt: skip
    return call, kept


def attend_forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D], and the binary logarithm of the sum of weights [B, H, T]."""
    call, kept = _call(given)
    out, lse = given.q.new_empty(given.q.shape), given.q.new_empty(given.q.shape[:3])
    call.out, call.lse = out.data_ptr(), lse.data_ptr()
    run("forward", call)
    del kept
    return out, lse


def attend_backward(given: Inputs, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, past_k and past_v."""
    call, kept = _call(given)
    grad, out, lse = dense(grad), out.contiguous(), lse.contiguous()
    call.out, call.lse = out.data_ptr(), lse.data_ptr()
    dq = given.q.new_empty(given.q.shape)
    others = [x.new_zeros(x.shape) for x in (given.k, given.v, given.past_k, given.past_v)]
    dk, dv, d_past_k, d_past_v = (x.data_ptr() for x in others)
    task = Backward(
        call=call, grad=rows(grad), dq=dq.data_ptr(), dk=dk, dv=dv, d_past_k=d_past_k,
        d_past_v=d_past_v,
    )  # fmt: skip
    run("backward", task)
    del kept
    return dq, *others


scan_native = register_scan("rat_scan_native", scan_forward, scan_backward)
attend_native = register_attend("rat_attend_native", attend_forward, attend_backward)
