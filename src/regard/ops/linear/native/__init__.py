"""The native form of the engine: plain C on CPUs, see `regard.native`. The files, C and Python:

- `sweep.h`, `sweep.c`: one pass over a panel of a state, the kernel
- `settle.h`, `settle.c`: what the tokens of a pass have to do with each other
- `decays.h`, `chunk.h`, `run.h`: factors of decays, runs of tokens, a panel on its way along them
- `head.h`, `jobs.h`, `walk.c`, `gradient.c`: heads, threads, forward, backward
- `straight.h`, `straight.c`: passes and what is between them as one loop, where all decays alike
- `decode.h`, `decode.c`, `decode.py`: one token after a past
- `again.py`: calls like one before, which need no check
- `maps.h`, `product.h`, `whole.h`, `whole.c`, `whole_gradient.c`, `whole.py`: no order of tokens
- `unit.c`, `unit.py`: keys of the delta rule
- `activate.h`, `activate.c`, `activate.py`, `blocks.py`: feature maps that are learned, in pieces
- `mapped.h`, `mapped.py`: maps that a walk applies itself
- `call.h`, `library.py`, `walk.py`: from the operands of the registered op to C
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.core.dispatch import Form
from regard.native import refusal
from regard.ops.linear.engine import encode, read
from regard.ops.linear.native import activate, decode, whole
from regard.ops.linear.native.blocks import in_blocks
from regard.ops.linear.native.library import divisor
from regard.ops.linear.native.mapped import in_walk
from regard.ops.linear.native.unit import with_native_unit
from regard.ops.linear.native.walk import Walked, walk
from regard.ops.linear.normaliser import mean
from regard.ops.linear.problem import Problem, Solution, each_sequence, featured


def refuse(problem: Problem) -> str | None:
    """Why the native form cannot serve a problem, or None."""
    if problem.q.device.type not in ("cpu", "meta"):
        return f"it runs on a CPU, not on {problem.q.device.type}"
    if problem.q.dtype == torch.float64:
        return "it computes in float32"
    if not problem.causal and problem.beta is None:
        return "not causal: every query reads one state"
    if problem.chunk is not None:
        return "its chunks have one size, nothing to do with chunk_size"
    return refusal()


def serve(problem: Problem) -> Solution:
    """The solution of a problem of one sequence that was not refused."""
    problem = featured(with_native_unit(activate.with_native_maps(problem)))
    q, k, S, z = problem.q, problem.k, problem.S, problem.z
    T, keys = q.shape[2], k.shape[2]
    together = min(T, keys) if problem.causal else 0
    if keys > together or not together or (S is None and together < T):
        # Keys before the first query, or all of them, or none: zeros in which gradients end.
        S, z = _encode(problem, keys - together)
    rows = []
    if together < T:  # queries before the first key, or all of them
        rows.append(_read(problem, q[:, :, : T - together], S, z))
    if together:
        lead = slice(keys - together, None)
        walked = _walk(problem, q[:, :, T - together :], lead, S, z)
        rows.append(walked.out)
        S, z = walked.S, walked.z
    if not rows:
        rows.append(_read(problem, q, S, z))
    out = rows[0] if len(rows) == 1 else torch.cat(rows, 2)
    if not problem.wants_state:
        return Solution(out)
    return Solution(out, S, z if problem.normaliser is not None else None)


def _cut(x: Tensor | None, tokens: slice) -> Tensor | None:
    return None if x is None else x[:, :, tokens]


def _walk(problem: Problem, q: Tensor, tokens: slice, S: Tensor | None, z: Tensor | None) -> Walked:
    return walk(
        q, problem.k[:, :, tokens], problem.v[:, :, tokens], _cut(problem.log_decay, tokens),
        _cut(problem.beta, tokens), S, z, *divisor(problem), problem.epsilon,
    )  # fmt: skip


def _encode(problem: Problem, count: int) -> tuple[Tensor, Tensor | None]:
    """S and z after the first `count` keys."""
    tokens, k = slice(None, count), problem.k
    if problem.beta is not None:
        blind = k.new_zeros(1, 1, 1, 1).expand(*k.shape[:2], count, k.shape[3])
        return _walk(problem, blind, tokens, problem.S, None).S, None
    log_decay, keys = _cut(problem.log_decay, tokens), k[:, :, tokens]
    S = encode(keys, problem.v[:, :, tokens], log_decay, problem.S)
    if problem.normaliser is None:
        return S, None
    z = None if problem.z is None else problem.z[..., None]
    ones = k.new_ones(*keys.shape[:3], 1)
    return S, encode(keys, ones, log_decay, z)[..., 0]


def _read(problem: Problem, q: Tensor, S: Tensor | None, z: Tensor | None) -> Tensor:
    """Every query reads the same state."""
    assert S is not None
    if problem.normaliser is None:
        return read(q, S)
    assert z is not None
    sums = read(q, torch.cat([S, z[..., None]], 3))
    return mean(sums, problem.minimum, problem.epsilon)


_serve_each = each_sequence(in_walk(in_blocks(in_walk(serve))))


def _run(problem: Problem) -> Solution:
    return decode.decode(problem) if decode.serves(problem) else _serve_each(problem)


FORMS: tuple[Form, ...] = (
    Form("native", "native", refuse, _run),
    Form("native", "whole", whole.refuse, whole.solve),
)
