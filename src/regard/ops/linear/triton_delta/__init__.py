"""The Triton form of the (gated) delta rule: which problems it serves, and how it is called.

Importing this needs no Triton and no GPU. The files:

- `registered.py`: the operators; `launch.py`: from operands to kernels; `table.py`: their warps
- `tile.py`: what kernels share; `tokens.py`: sums of decays and lengths of keys
- `system.py`: the triangular system of every chunk, inverted; `scan.py`: from chunk to chunk,
  forwards and backwards; `output.py`: what queries read; `gradient_kernels.py`: all gradients
- `decode.py`: a few tokens, one after the other
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regard import gpu
from regard.core.dispatch import Form
from regard.ops.linear.engine import Rule, follow, read
from regard.ops.linear.problem import Problem, Solution, each_sequence
from regard.ops.linear.triton_delta.registered import delta

NAME = "linear_delta"
WIDEST = 128  # channels of a key and of a value
CHUNK = 64


def refuse(problem: Problem) -> str | None:
    """Why no kernel here can serve a problem, from its metadata."""
    q, v = problem.q, problem.v
    if problem.beta is None:
        return "it is for the delta rule"
    if problem.normaliser is not None or problem.per_channel:
        return "its delta rule has no normaliser and one decay per token"
    maps = problem.query_map.name, problem.key_map.name
    if maps[0] != "identity" or maps[1] not in ("identity", "unit"):
        return f"its kernels take keys as they are or as unit vectors, not {maps[1]} (of {maps[0]})"
    reason = gpu.refusal(q.device, q.dtype)
    if reason is not None:
        return reason
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"its heads have at most {WIDEST} channels, not {max(q.shape[3], v.shape[3])}"
    if problem.chunk not in (None, CHUNK):
        return f"its chunks have {CHUNK} tokens"
    return None


def _refuse_unverified(problem: Problem) -> str | None:
    reason = refuse(problem)
    if reason is not None:
        return reason
    size = max(problem.q.shape[3], problem.v.shape[3])
    return gpu.unverified(NAME, problem.q.device, problem.q.dtype, size)


def _encode(
    scale: float, unit: bool, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    state: Tensor | None,
) -> Tensor:  # fmt: skip
    return delta(k[:, :, :0], k, v, beta, log_decay, state, scale, unit)[1]


def _walk(
    scale: float, unit: bool, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    log_decay: Tensor | None, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return delta(q, k, v, beta, log_decay, state, scale, unit)


def _read(scale: float, q: Tensor, state: Tensor) -> Tensor:
    return (read(q.to(state.dtype), state) * scale).to(q.dtype)


def _solve(problem: Problem) -> Solution:
    heads, k, v = problem.k.shape[1], problem.k, problem.v
    beta, log_decay, scale = problem.beta, problem.log_decay, problem.scale
    assert beta is not None
    if problem.key_mask is not None:  # what a masked key holds must not be computed on
        masked = ~problem.key_mask[:, None]
        k, v = (x.masked_fill(masked[..., None], 0.0) for x in (k, v))
        beta = beta.masked_fill(masked, 0.0)
        if log_decay is not None:
            log_decay = log_decay.masked_fill(masked, 0.0)
    if beta.shape[1] != heads:
        beta = beta.expand(-1, heads, -1)
    if log_decay is not None and log_decay.shape[1] != heads:
        log_decay = log_decay.expand(-1, heads, -1)
    by = 1.0 if scale is None or isinstance(scale, Tensor) else float(scale)
    unit = problem.key_map.name == "unit"
    if problem.causal and problem.q.shape[2] == k.shape[2]:  # the usual call, the short way
        out, state = delta(problem.q, k, v, beta, log_decay, problem.S, by, unit)
        return Solution(_scaled(out, scale), state)
    rule = Rule(
        partial(_encode, by, unit), partial(_read, by),
        partial(_walk, by, unit) if problem.causal else None,
    )  # fmt: skip
    out, state = follow(rule, problem.q, (k, v, beta, log_decay), problem.S)
    return Solution(_scaled(out, scale), state)


def _scaled(out: Tensor, scale: float | Tensor | None) -> Tensor:
    """The output is linear in the queries, so a tensor of scales may come last."""
    if not isinstance(scale, Tensor):
        return out
    return out.to(torch.float32) * scale.to(torch.float32).reshape(-1, 1, 1)


serve = each_sequence(_solve)
FORMS: tuple[Form, ...] = (
    Form("triton", "delta triton", _refuse_unverified, serve),
    Form("triton", "delta triton unverified", refuse, serve, auto=False),
)
