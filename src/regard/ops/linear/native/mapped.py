"""A walk that makes its features itself, where no gradient is needed and nobody looks on.

In torch, features of queries and keys are tensors of their own: of twice the width for Hedgehog,
and even unit keys and scaled queries are two passes through fresh memory. In C they are made a
block of tokens at a time (`mapped.h`) and read from the cache; they are the same bits. With
gradients that is done where a forward is made again in its backward pass (`blocks.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.ops.linear.native.activate import KINDS
from regard.ops.linear.native.decode import Run, untraced
from regard.ops.linear.native.library import Map, divisor
from regard.ops.linear.native.walk import planned, walk_mapped
from regard.ops.linear.problem import NUMBERS, Feature, Problem, Solution, Solve

_PLAIN = {"identity": 0, "unit": 2, "relu": 3}  # of call.h
_TIMES, _LEARNED = 1, 4
_LANES = 16  # columns of a weight come in multiples of the widest vector


def in_walk(solve: Solve) -> Solve:
    """`solve`, but for problems whose maps a walk can make itself."""
    return lambda problem: _walk(problem) if serves(problem) else solve(problem)


def serves(problem: Problem) -> bool:
    """Whether it is a causal problem of float32 tokens with such maps and without gradients."""
    maps = problem.query_map, problem.key_map
    some = any(map.name != "identity" for map in maps) or problem.scale is not None
    return some and _fits(problem)


def _fits(problem: Problem) -> bool:
    maps, q = (problem.query_map, problem.key_map), problem.q
    return (
        problem.causal
        and q.dtype == torch.float32
        and q.shape[2] == problem.k.shape[2] > 0
        and q.numel() > 0
        and problem.v.numel() > 0
        and problem.key_mask is None
        and type(problem.scale) in NUMBERS
        and all(_known(map) for map in maps)
        and not any(x.requires_grad and torch.is_grad_enabled() for m in maps for x in m.weights)
        and untraced(problem, problem.S, problem.z)
    )


def _known(feature: Feature) -> bool:
    if feature.name in _PLAIN:
        return True
    kind, weight = _learned(feature)[0], _weight(feature)
    return kind in KINDS and weight is not None and weight.shape[2] % _LANES == 0


def _learned(feature: Feature) -> tuple[str, bool, bool]:
    """Activation, whether both halves are there, whether it is shifted."""
    prefix, _, name = feature.name.partition(":")
    kind = name.removesuffix(":half").removesuffix("_shifted")
    return kind if prefix == "hedgehog" else "", not name.endswith(":half"), "_shifted" in name


def _weight(feature: Feature) -> Tensor | None:
    return getattr(feature.apply, "keywords", {}).get("weight")


def _map(feature: Feature, inner: int, scale: float) -> tuple[Map, list[Tensor]]:
    """What C is told, and the tensors that must live as long."""
    if feature.name in _PLAIN:
        kind = _PLAIN[feature.name] or (_TIMES if scale != 1.0 else 0)
        return Map(kind=kind, inner=inner, scale=scale), []
    weight, bias = _weight(feature), feature.apply.keywords["bias"]
    assert weight is not None
    kept = [weight.detach().to(torch.float32).contiguous()]
    columns = weight.shape[2]
    if bias is not None:
        rows = bias.detach().to(torch.float32).reshape(bias.shape[0], -1)
        kept.append(rows.expand(-1, columns).contiguous())
    name, full, shifted = _learned(feature)
    found = Map(
        kind=_LEARNED, inner=inner, name=KINDS[name], full=full, shifted=shifted,
        skip=feature.apply.keywords["skip"], weights=weight.shape[0], columns=columns, scale=scale,
        weight=kept[0].data_ptr(),
    )  # fmt: skip
    if bias is not None:
        found.biases, found.bias = kept[1].shape[0], kept[1].data_ptr()
    return found, kept


def _walk(problem: Problem) -> Solution:
    maps, kept = _maps(problem)
    walked = walk_mapped(*_operands(problem), *_options(problem), maps=maps)
    del kept
    if not problem.wants_state:
        return Solution(walked.out)
    return Solution(walked.out, walked.S, walked.z if problem.normaliser is not None else None)


def plan(problem: Problem, isa: str | None) -> Run | None:
    """What runs every problem with the metadata and options of this one; None for copies.

    It brings the bits that `serve` brings, which leaves out maps that are identities.
    """
    if not _fits(problem):
        return None
    maps, kept = _maps(problem)
    given = [x for m in (problem.query_map, problem.key_map) for x in m.weights]
    if [x.data_ptr() for x in kept] != [x.data_ptr() for x in given]:
        return None
    told = *_operands(problem), *_options(problem)
    run = planned(*told, maps=maps, wants_state=problem.wants_state, isa=isa)
    if run is None:
        return None

    def again(problem: Problem, S: Tensor | None, z: Tensor | None) -> Solution:
        q, k, v, log_decay, beta, _, _ = _operands(problem)
        both = problem.query_map.weights, problem.key_map.weights
        weights = tuple(given[0] if given else None for given in both)
        return Solution(*run((q, k, v, log_decay, beta, S, z), weights))

    return again


def _maps(problem: Problem) -> tuple[tuple[Map, Map], list[Tensor]]:
    """Both maps for C, and the tensors that must live as long."""
    inner, scale = problem.q.shape[3], problem.scale
    of_q, kept = _map(problem.query_map, inner, 1.0 if scale is None else float(scale))
    of_k, others = _map(problem.key_map, inner, 1.0)
    return (of_q, of_k), kept + others


def _operands(problem: Problem) -> tuple[Any, ...]:
    """q, k, v, log_decay and beta of every key head, S, z."""
    log_decay, beta, heads = problem.log_decay, problem.beta, problem.k.shape[1]
    if log_decay is not None and log_decay.shape[1] != heads:
        log_decay = log_decay.expand(-1, heads, *log_decay.shape[2:])
    if beta is not None and beta.shape[1] != heads:
        beta = beta.expand(-1, heads, -1)
    return problem.q, problem.k, problem.v, log_decay, beta, problem.S, problem.z


def _options(problem: Problem) -> tuple[Any, ...]:
    """The normaliser, its numbers, the width of the features."""
    return *divisor(problem), problem.epsilon, problem.key_map.width(problem.q.shape[3])
