"""A call like one before it goes straight to the kernels.

What a short call costs is Python's: checks, the choice of a form, torch's dispatcher. All of that
looks at metadata and options only. `signature` names them where a call is nothing but tensors and
numbers, nobody looks on and no gradient is needed; a call whose signature was served once has a
recording (`regard.gpu.replay`) and needs memory for its results, no more.

Importing this needs no Triton and no GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.core.dispatch import is_asking
from regard.core.watched import PLAIN, is_watched
from regard.gpu.operands import channels_last
from regard.gpu.replay import Plan, alike
from regard.ops.linear.problem import NUMBERS, Problem
from regard.ops.linear.triton.shapes import Options, of_forward

_MOST = 1024
_UNLEARNED = {"identity", "elu", "relu"}  # maps without weights


class _Known(NamedTuple):
    plan: Plan
    rooms: list[tuple[tuple[int, ...], torch.dtype] | None]  # of results; None: has no element


_known: dict[tuple[Any, ...], _Known] = {}


def there(x: Tensor) -> bool:
    """Whether kernels can start on a tensor where it is."""
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def signature(
    op: str, problem: Problem, state: Any, return_state: bool, impl: str
) -> tuple[Any, ...] | None:
    """All that decides about an unchecked call of `op`, or None where that is more than this."""
    q, k, v, decay, mask = problem.q, problem.k, problem.v, problem.log_decay, problem.key_mask
    if is_watched() or type(q) not in PLAIN or not there(q):
        return None
    if state is not None or return_state is not False or problem.causal is not True:
        return None
    left = problem.beta, problem.chunk, problem.cu_seqlens, problem.cu_seqlens_k
    if left != (None, None, None, None) or type(problem.scale) not in NUMBERS:
        return None
    names = problem.query_map.name, problem.key_map.name
    if not _UNLEARNED.issuperset(names) or is_asking() or torch.is_autocast_enabled("cuda"):
        return None
    given = q, k, v, decay, mask
    grad = torch.is_grad_enabled()
    for x in given:
        if x is not None and (type(x) not in PLAIN or (grad and x.requires_grad)):
            return None
    numbers = problem.scale, problem.normaliser, problem.epsilon
    return op, impl, *names, *numbers, *map(type, numbers), *alike(*given)


def remember(signature: tuple[Any, ...], problem: Problem) -> None:
    """Lets the next call of that signature go straight to what was recorded of this one."""
    from regard.ops.linear.triton import options_of
    from regard.ops.linear.triton.launch import PLANS

    q, k, v, decay, mask = _operands(problem)
    if not (q is channels_last(q) and k is channels_last(k) and v is channels_last(v)):
        return  # copies, which a recording does not make
    names = problem.query_map.name, problem.key_map.name
    chosen = Options._make((*options_of(problem, names), False))
    plan = PLANS.get((chosen, *alike(q, k, v, decay, mask, None, None, None, None)))
    if plan is None:
        return
    if len(_known) >= _MOST:
        _known.clear()
    shapes = of_forward(q, v, chosen, decay is not None, False)
    rooms = [None if 0 in shape else (shape, dtype) for shape, dtype in shapes]
    _known[signature] = _Known(plan, rooms)


def served(signature: tuple[Any, ...], problem: Problem) -> Tensor | None:
    """The output of a call of a signature that is known; else None."""
    known = _known.get(signature)
    if known is None:
        return None
    device = problem.q.device
    results = [
        None if room is None else torch.empty(room[0], dtype=room[1], device=device)
        for room in known.rooms
    ]
    known.plan.run((*_operands(problem), None, None, None, None, *results))
    return results[0]


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    decay, heads = problem.log_decay, problem.k.shape[1]
    if decay is not None and decay.shape[1] != heads:
        decay = decay.expand(-1, heads, -1)
    return problem.q, problem.k, problem.v, decay, problem.key_mask
