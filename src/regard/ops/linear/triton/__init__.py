"""The Triton form of the engine, without the delta rule: which problems it serves, and how.

Importing this needs no Triton and no GPU. The files:

- `registered.py`: the operators; `shapes.py`: what goes in and comes out; `launch.py`: the
  forward, from operands to kernels and back; `gradient.py`: the backward; `table.py`: what
  kernels are told, and with which tiles they run
- `walk.py`, `maps.py`: what kernels share: tiles, decays inside a chunk, feature maps
- `forward.py`: what segments add, the scan over them, outputs; `backward.py`, `of_queries.py`,
  `of_keys.py`: the same for gradients; `whole.py`: one state for all queries; `decode.py`: a
  few tokens; `twofold.py`: the forward of maps that make two blocks of features; `learned.py`:
  what is linear in such a map
- `again.py`: calls like one before
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard import gpu
from regard.core.dispatch import Form
from regard.ops.linear.problem import IDENTITY, Feature, Problem, Solution, each_sequence
from regard.ops.linear.triton.learned import inside
from regard.ops.linear.triton.registered import linear_triton_fwd
from regard.ops.linear.triton.shapes import Options, Twofold
from regard.ops.linear.triton.table import MAPS

NAME, TWOFOLD = "linear", "linear_twofold"
WIDEST = 256  # features of a key
WIDEST_BLOCK = 128  # of a map of two blocks, each
WIDEST_VALUE = 128


def refuse(problem: Problem) -> str | None:
    """Why no kernel here can serve a problem, from its metadata."""
    q, v = problem.q, problem.v
    if problem.beta is not None:
        return "it has no delta rule"
    reason = gpu.refusal(q.device, q.dtype)
    if reason is not None:
        return reason
    if problem.per_channel:
        return "it has one decay per token, not one per channel"
    if problem.chunk is not None:
        return "the sizes of its chunks are fixed"
    width = problem.key_map.width(q.shape[3])
    if width > WIDEST:
        return f"its keys have at most {WIDEST} features, not {width}"
    if v.shape[3] > WIDEST_VALUE:
        return f"its values have at most {WIDEST_VALUE} channels, not {v.shape[3]}"
    scale = problem.scale
    if problem.minimum is not None and scale is not None and not _positive(scale):
        return "with a clamp its scale is a number above 0"
    return None


def _positive(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale > 0


def _refuse_unverified(problem: Problem) -> str | None:
    reason = refuse(problem)
    if reason is not None:
        return reason
    q, E = problem.q, problem.v.shape[3]
    if _formed(problem) and MAPS[problem.key_map.name].two:
        reason = gpu.unverified(TWOFOLD, q.device, q.dtype, max(q.shape[3], E))
        if reason is None:
            return None
    return gpu.unverified(NAME, q.device, q.dtype, max(problem.key_map.width(q.shape[3]), E))


def _formed(problem: Problem) -> bool:
    """Whether the kernels form the features of this problem themselves."""
    maps = problem.query_map, problem.key_map
    known = all(_projects(x) and x.name in MAPS for x in maps)
    if not known or MAPS[maps[0].name].two != MAPS[maps[1].name].two:
        return False
    width = problem.key_map.width(problem.q.shape[3])
    return not MAPS[maps[1].name].two or width <= 2 * WIDEST_BLOCK


def _projects(feature: Feature) -> bool:
    """Whether what the activation is taken of is known without it."""
    return feature.project is not None or not feature.name.startswith("hedgehog")


def _projected(x: Tensor, feature: Feature) -> Tensor:
    return x if feature.project is None else feature.project(x)


def _applied(x: Tensor, feature: Feature) -> Tensor:
    """Features in the dtype of x, computed in float32."""
    return x if feature is IDENTITY else feature.apply(x.float()).to(x.dtype)


def options_of(problem: Problem, names: tuple[str, str]) -> tuple[Any, ...]:
    """The operator's options, but for the last: whether the state is wanted."""
    scale, normalised = 1.0, problem.normaliser is not None
    minimum = -torch.inf if problem.minimum is None else problem.minimum
    epsilon = problem.epsilon
    if problem.scale is not None and not isinstance(problem.scale, Tensor):
        if normalised:  # s n / max(s z, m) = n / max(z, m / s)
            minimum, epsilon = minimum / problem.scale, epsilon / problem.scale
        else:
            scale = float(problem.scale)
    return problem.causal, *names, scale, normalised, minimum, epsilon


def _maps(problem: Problem, names: tuple[str, str]) -> tuple[Tensor | None, Tensor | None]:
    """The linear maps that kernels apply themselves."""
    options = Options._make((*options_of(problem, names), problem.wants_state))
    decays, D = problem.log_decay is not None, problem.q.shape[3]
    twofold = Twofold.of(problem.v, D, options, decays, gpu.interpreting())
    if torch._C._are_functorch_transforms_active():
        return None, None  # a mapped map would need a head of its own for every example
    length = max(problem.q.shape[2], problem.k.shape[2])
    of_queries, of_keys = twofold.forms(length, gpu.interpreting())
    return (
        inside(problem.query_map, D) if of_queries else None,
        inside(problem.key_map, D) if of_keys else None,
    )


def _solve(problem: Problem) -> Solution:
    """The solution for one sequence per row of the batch."""
    q, k, v, mask, heads = problem.q, problem.k, problem.v, problem.key_mask, problem.k.shape[1]
    normalised, maps = problem.normaliser is not None, (None, None)
    if _formed(problem):
        names = problem.query_map.name, problem.key_map.name
        maps = _maps(problem, names)
        q = q if maps[0] is not None else _projected(q, problem.query_map)
        if maps[1] is None:
            if mask is not None and problem.key_map.weights:
                k = k.masked_fill(~mask[:, None, :, None], 0.0)
            k = _projected(k, problem.key_map)
    else:
        names = IDENTITY.name, IDENTITY.name
        if mask is not None:  # before anything is computed: NaN there has no gradient either
            k = k.masked_fill(~mask[:, None, :, None], 0.0)
        q, k = _applied(q, problem.query_map), _applied(k, problem.key_map)
    decay = problem.log_decay
    if decay is not None and decay.shape[1] != heads:
        decay = decay.expand(-1, heads, -1)
    out, S, z, *_ = linear_triton_fwd(
        q, k, v, decay, mask, problem.S, problem.z if normalised else None, *maps,
        *options_of(problem, names), problem.wants_state,
    )  # fmt: skip
    if isinstance(problem.scale, Tensor):
        out = _scaled(out, problem.scale.reshape(-1, 1, 1).to(torch.float32))
    if not problem.wants_state:
        return Solution(out)
    return Solution(out, S, z if normalised else None)


def _scaled(out: Tensor, scale: Tensor) -> Tensor:
    """out * scale; rows that have overflowed have no part in the gradient of the scale.

    Else a row that no loss looks at would: 0 times its inf is no zero.
    """
    finite = out.isfinite()
    return torch.where(finite, torch.where(finite, out, 0.0) * scale, out * scale.detach())


serve = each_sequence(_solve)

FORMS: tuple[Form, ...] = (
    Form("triton", "triton", _refuse_unverified, serve),
    Form("triton", "triton unverified", refuse, serve, auto=False),
)
