"""The forms of the engine, the fastest first: every mechanism has all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from regard.core.dispatch import Form
from regard.core.state import FixedState
from regard.ops.linear import native, tiled, triton, triton_delta
from regard.ops.linear.chunked import chunked
from regard.ops.linear.chunked_channels import chunked_channels
from regard.ops.linear.chunked_delta import chunked_delta, encode_delta
from regard.ops.linear.engine import Rule, by_rule, encode, read
from regard.ops.linear.problem import Problem, Solution, each_sequence
from regard.ops.linear.recurrent import recurrent
from regard.ops.linear.recurrent_delta import recurrent_delta

# The equations of a mechanism: the output and the state of one sequence.
Reference = Callable[[Problem, FixedState | None], tuple[Tensor, FixedState]]


def _recurrent(problem: Problem) -> Rule:
    if problem.beta is None:
        return Rule(encode, read, recurrent)
    return Rule(partial(encode_delta, chunk=problem.chunk), read, recurrent_delta)


def _chunked(problem: Problem) -> Rule:
    if problem.beta is None:
        walk = chunked_channels if problem.per_channel else chunked
        return Rule(encode, read, partial(walk, chunk=problem.chunk))
    walk = partial(chunked_delta, chunk=problem.chunk)
    return Rule(partial(encode_delta, chunk=problem.chunk), read, walk)


def _encode_read(problem: Problem) -> Rule:
    return _chunked(problem)._replace(walk=None)


def needs_causal(problem: Problem) -> str | None:
    """Why a form that walks from token to token does not serve a problem, or None."""
    return None if problem.causal else "not causal: every query reads one state"


def _needs_one_token(problem: Problem) -> str | None:
    if not problem.causal:
        return needs_causal(problem)
    if min(problem.q.shape[2], problem.k.shape[2]) != 1:
        return "for one token; more of them are faster in chunks"
    return None


def _refuses_causal(problem: Problem) -> str | None:
    return "causal: every query reads a state of its own" if problem.causal else None


def _reference_refuses(problem: Problem) -> str | None:
    return None if problem.chunk is None else "it has no chunks, nothing to do with chunk_size"


EAGER = (
    Form("eager", "recurrent", _needs_one_token, by_rule(_recurrent)),
    Form("eager", "chunked", needs_causal, by_rule(_chunked)),
    Form("eager", "tiled", tiled.refuse, tiled.solve),
    Form("eager", "encode_read", _refuses_causal, by_rule(_encode_read)),
)

ENGINE = (*triton.FORMS, *triton_delta.FORMS, *native.FORMS, *EAGER)


def build(reference: Reference, state_name: str) -> tuple[Form, ...]:
    """The forms of a mechanism whose equations are `reference`."""

    def solve(problem: Problem) -> Solution:
        state = None
        if problem.S is not None:
            tensors = {"S": problem.S} | ({} if problem.z is None else {"z": problem.z})
            # Not the true length: what came before is in S, and only its being there counts.
            state = FixedState(state_name, 1, tensors)
        out, after = reference(problem, state)
        return Solution(out, after["S"], after.tensors.get("z"))

    form = Form("reference", "reference", _reference_refuses, each_sequence(solve), auto=False)
    return *ENGINE, form
