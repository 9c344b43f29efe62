"""A call like one before it goes straight to C.

What a short call costs is Python's: checks, the choice of a form, torch's dispatcher. All of that
looks at metadata and options only. `signature` names them where a call is nothing but tensors and
numbers, nobody looks on and no gradient is needed, and a call whose signature was served once has
a plan: what is the same for all of them is ready, and pointers and room for results are added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import is_autocast_enabled, is_grad_enabled

from regard.core.dispatch import Form, is_asking
from regard.core.state import FixedState
from regard.core.watched import PLAIN, is_watched
from regard.native import chosen
from regard.ops.linear.native import decode, mapped, whole
from regard.ops.linear.native.decode import Run
from regard.ops.linear.problem import NUMBERS, Feature, Problem, Solution

_MOST = 1024

known: dict[tuple[Any, ...], Run] = {}  # by signature


def signature(
    op: str, problem: Problem, state: Any, return_state: bool, impl: str
) -> tuple[Any, ...] | None:
    """All that decides about an unchecked call of `op`, or None where that is more than this."""
    (
        q, k, v, causal, query_map, key_map, scale, key_mask, log_decay, beta, normaliser, _, _,
        chunk, cu_seqlens, cu_seqlens_k, _, epsilon,
    ) = problem  # fmt: skip
    if type(q) not in PLAIN or not q.is_cpu or is_watched() or is_autocast_enabled("cpu"):
        return None
    if q.dtype is not torch.float32 or type(scale) not in NUMBERS or is_asking():
        return None
    if type(causal) is not bool or type(return_state) is not bool or type(impl) is not str:
        return None
    if not (key_mask is None and chunk is None and cu_seqlens is None and cu_seqlens_k is None):
        return None
    given, past = [q, k, v, log_decay, beta], None
    if state is not None:
        if type(state) is not FixedState:
            return None
        tensors = state.tensors
        past = state.mechanism, len(tensors)
        given += [tensors.get("S"), tensors.get("z")]
    if query_map.weights or key_map.weights:
        if not (_weighed(query_map) and _weighed(key_map)):
            return None
        given += [*query_map.weights, None, *key_map.weights]
    found: list[Any] = [
        chosen(), op, impl, causal, return_state, past, scale, normaliser, epsilon,
        query_map.name, key_map.name,
    ]  # fmt: skip
    grad = is_grad_enabled()
    for x in given:
        if x is None:
            found.append(None)
        elif type(x) not in PLAIN or not x.is_cpu or (grad and x.requires_grad):
            return None
        else:
            found += (x.shape, x.stride(), x.dtype)
    return tuple(found)


def _weighed(map: Feature) -> bool:
    """Whether a map is one weight, and nothing else that a signature would have to name."""
    given = getattr(map.apply, "keywords", None)
    return not map.weights or (
        given is not None and given["bias"] is None and given["skip"] is False
    )


def remember(signature: tuple[Any, ...], problem: Problem, form: Form) -> None:
    """Lets the next call of that signature, which `form` has served, go straight to C."""
    isa, run = signature[0], None
    if form.name == "whole":
        run = whole.plan(problem, isa)
    elif form.name == "native" and decode.serves(problem):
        run = decode.plan(problem, isa)
    elif form.name == "native":
        run = mapped.plan(problem, isa)
    if run is None:
        return
    if len(known) >= _MOST:
        known.clear()
    known[signature] = run


def served(signature: tuple[Any, ...], problem: Problem, state: Any) -> Solution | None:
    """The solution of a call of a signature that is known; else None."""
    run = known.get(signature)
    if run is None:
        return None
    if state is None:
        return run(problem, None, None)
    return run(problem, state.tensors.get("S"), state.tensors.get("z"))
