"""From queries, rows and lists to a call of C, and back to its results."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.ops.block_sparse.native.library import BAD_PLAN, BLOCKS, LEVELS, call_of, run

# Multiplications of queries and rows from which a second thread is worth its 30 us.
LEAST_WORK = 1 << 24


@dataclass(frozen=True)
class Lists:
    """Which rows which block of queries attends to: numbers and tensors of `call.h`.

    `pairs`: of a query and a row, about, per head: by which threads are chosen.
    """

    numbers: dict[str, int]
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    pairs: int = 0


def of_plan(
    q: Tensor, rows: int, plan: Tensor, indices: bool, block_q: int, block_k: int, S: int,
    left: int, right: int, replicate: bool,
) -> Lists:  # fmt: skip
    """Lists of levels, or of indices of key blocks; where there are `rows` = S, C pools them."""
    T, width = q.shape[2], plan.shape[3]
    numbers = {
        "kind": BLOCKS if indices else LEVELS, "plan_batch": max(plan.shape[0], 1),
        "plan_heads": max(plan.shape[1], 1), "lists": plan.shape[2], "width": width, "keys": S,
        "block_q": block_q, "block_k": block_k, "left": min(left, T + S),
        "right": min(right, T + S), "replicate": int(replicate),
        "pools": int(rows == S),
    }  # fmt: skip
    kind, widest = (torch.int32, torch.int64) if indices else (torch.int8, torch.int16)
    if plan.dtype.itemsize >= widest.itemsize:  # what is cut off must not make a wrong one right
        plan = plan.clamp(-2, torch.iinfo(kind).max)
    plan = plan.to(kind)
    reach = min(S, left + right + 1) if left >= 0 and right >= 0 else S
    seen = min(width * block_k, reach) if indices else reach // (4 if left < 0 else 1)
    return Lists(numbers, {"plan": plan.contiguous()}, T * seen)


def forward(
    op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lists: Lists,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Output and log-sum-exp of q against rows k, v, bias; None for a wrong plan.

    C scales: torch would divide it between its threads, which then spin for 17 ms beside ours.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    bias = None if bias is None else bias.contiguous()
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3])
    tensors = {"q": q, "k": k, "v": v, "bias": bias, "out": out, "lse": lse}
    call = call_of(_numbers(q, k, v, bias, lists, scale), lists.tensors | tensors)
    return None if run(op, "forward", call) == BAD_PLAN else (out, lse)


def backward(
    op: str, d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, lists: Lists, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias (no elements where there is none)."""
    given = {"d_out": d_out, "out": out, "lse": lse, "q": q, "k": k, "v": v, "bias": bias}
    tensors = {name: None if x is None else x.contiguous() for name, x in given.items()}
    dq, dk, dv = (_zeros(x.shape) for x in (q, k, v))
    d_bias = q.new_zeros(0) if bias is None else _zeros(k.shape[:3])
    tensors |= {"dq": dq, "dk": dk, "dv": dv, "d_bias": d_bias}
    numbers = _numbers(q, k, v, bias, lists, scale)
    run(op, "backward", call_of(numbers, lists.tensors | tensors))
    if bias is not None and bias.shape[1] < k.shape[1]:
        d_bias = d_bias.sum(1, keepdim=True)
    return dq, dk, dv, d_bias


def _zeros(shape: torch.Size) -> Tensor:
    """float32 zeros without torch's threads."""
    made = torch.empty(shape, dtype=torch.float32)
    ctypes.memset(made.data_ptr(), 0, made.nbytes)
    return made


def _numbers(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lists: Lists, scale: float
) -> dict[str, int | float]:
    (B, H, T, D), (_, Hk, rows, Dv) = q.shape, v.shape
    work = B * H * lists.pairs * max(D, Dv)
    return lists.numbers | {
        "batch": B, "heads": H, "key_heads": max(Hk, 1), "queries": T, "rows": rows, "channels": D,
        "value_channels": Dv, "bias_heads": 0 if bias is None else bias.shape[1],
        "scale": scale, "threads": torch.get_num_threads() if work >= LEAST_WORK else 1,
    }  # fmt: skip
