"""Long problems a piece at a time, so that what is made for a piece never leaves the cache.

Features of 16k tokens are tens of megabytes of fresh memory, whose page faults cost more than the
kernel; those of a thousand tokens are written where the last ones lay. With gradients the features
of a piece are made again in its backward pass, so that none is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.ops.linear.problem import Problem, Solution, Solve

TOKENS = 1024  # of a piece
PER_KEY = {"k": 2, "v": 2, "key_mask": 1, "log_decay": 2, "beta": 2}


def in_blocks(solve: Solve, tokens: int = TOKENS) -> Solve:
    """`solve` on one piece after the other, from state to state, where it makes anything."""

    def run(problem: Problem) -> Solution:
        length = problem.q.shape[2]
        square = problem.causal and problem.k.shape[2] == length and problem.cu_seqlens is None
        if length <= tokens or not square or not _makes(problem) or _watched(problem):
            return solve(problem)
        if not _needs_gradients(problem):
            return _without(problem)
        return _with_gradients(problem) if _widens(problem) else solve(problem)

    def _without(problem: Problem) -> Solution:
        out, at, S, z = None, 0, problem.S, problem.z
        for piece in _pieces(problem, tokens):
            solution = solve(piece._replace(S=S, z=z))
            if out is None:
                E, length = solution.out.shape[3], problem.q.shape[2]
                out = solution.out.new_empty(*solution.out.shape[:2], length, E)
            out[:, :, at : at + piece.q.shape[2]] = solution.out
            at, S, z = at + piece.q.shape[2], solution.S, solution.z
        assert out is not None
        return Solution(out, S, z)

    def _with_gradients(problem: Problem) -> Solution:
        rows, S, z = [], problem.S, problem.z
        for piece in _pieces(problem, tokens):
            out, S, z = _MadeAgain.solve(solve, piece._replace(S=S, z=z))
            rows.append(out)
        return Solution(torch.cat(rows, 2), S, z)

    return run


class _MadeAgain(torch.autograd.Function):
    """A solution that keeps its problem only, and is made again when its gradient is asked for."""

    FIELDS = ("q", "k", "v", "scale", "key_mask", "log_decay", "beta", "S", "z")

    @staticmethod
    def solve(solve: Solve, problem: Problem) -> Solution:
        both = (*problem.query_map.weights, *problem.key_map.weights)
        weights = tuple({id(x): x for x in both}.values())  # tied maps have one gradient
        fields = [n for n in _MadeAgain.FIELDS if isinstance(getattr(problem, n), Tensor)]
        tensors = (*(getattr(problem, name) for name in fields), *weights)
        found = _MadeAgain.apply(solve, problem, fields, *tensors)
        out, S, z = (x if x.dim() > 1 else None for x in found)
        assert out is not None
        return Solution(out, S, z)

    @staticmethod
    def forward(ctx: Any, solve: Solve, problem: Problem, fields: list[str], *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.solve, ctx.fields = solve, fields
        ctx.problem = problem._replace(**dict.fromkeys(fields))
        return tuple(problem.q.new_empty(0) if x is None else x for x in solve(problem))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        count = len(ctx.fields)
        with torch.enable_grad():
            # Weights are what the maps are closed over: they stand in the new graph themselves.
            mine = [
                x.detach().requires_grad_(n) for x, n in zip(saved[:count], needed, strict=False)
            ]
            wanted = [*mine, *saved[count:]]
            problem = ctx.problem._replace(**dict(zip(ctx.fields, mine, strict=True)))
            pairs = [
                (x, g) for x, g in zip(ctx.solve(problem), gradients, strict=True)
                if x is not None and x.requires_grad
            ]  # fmt: skip
        inputs = [x for x, n in zip(wanted, needed, strict=True) if n]
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, given, allow_unused=True))
        return None, None, None, *(next(found) if n else None for n in needed)


def _pieces(problem: Problem, tokens: int) -> list[Problem]:
    """One after the other; all but the last ask for their state."""
    # split, not slices: the gradient of one slice is a whole tensor of zeros around it.
    queries = problem.q.split(tokens, 2)
    given = {name: x.split(tokens, a) for name, a in PER_KEY.items()
             if (x := getattr(problem, name)) is not None}  # fmt: skip
    found = []
    for number, q in enumerate(queries):
        wanted = problem.wants_state or number < len(queries) - 1
        own = {name: parts[number] for name, parts in given.items()}
        found.append(problem._replace(q=q, wants_state=wanted, **own))
    return found


def _makes(problem: Problem) -> bool:
    """Whether anything as long as the inputs is made of them first."""
    maps = {problem.query_map.name, problem.key_map.name}
    return maps != {"identity"} or problem.q.dtype in (torch.bfloat16, torch.float16)


def _widens(problem: Problem) -> bool:
    """Whether features are costly to keep: learned ones. Of others, a second walk costs more."""
    return any(":" in map.name for map in (problem.query_map, problem.key_map))


def _watched(problem: Problem) -> bool:
    """Whether a transform or a tracer looks on, or it is no CPU's problem."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return traced or problem.q.device.type != "cpu"


def _needs_gradients(problem: Problem) -> bool:
    tensors = (*problem, *problem.query_map.weights, *problem.key_map.weights)
    needs = any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    return needs and torch.is_grad_enabled()
