"""From the arguments of an op to a form and back: what all ops with a fixed-size state share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from regard.core.checks import (
    Sizes,
    check_flag,
    check_float_operand,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
)
from regard.core.dispatch import Form, choose
from regard.core.packed import check_packed
from regard.core.precision import cast_for_autocast, without_autocast
from regard.core.state import FixedState
from regard.ops.linear.forms import Reference, build
from regard.ops.linear.native import again as native_again
from regard.ops.linear.problem import Problem, Solution
from regard.ops.linear.states import check_fixed
from regard.ops.linear.triton import again


class Mechanism(NamedTuple):
    """The op in whose name a call is checked, the name in its states, and its forms.

    per_channel: whether it takes a log_decay for every channel of a key.
    """

    op: str
    state_name: str
    forms: tuple[Form, ...]
    per_channel: bool = False


def mechanism(
    op: str, state_name: str, reference: Reference, *, per_channel: bool = False
) -> Mechanism:
    """A mechanism with every form of the engine.

    `reference(problem, state)` calls the equations on `problem`'s arguments (of one sequence)
    with `return_state=True` and returns the output and the state.
    """
    return Mechanism(op, state_name, build(reference, state_name), per_channel)


def attend(
    owner: Mechanism,
    problem: Problem,
    *,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
    finish: Callable[[Solution], Tensor] | None = None,
) -> Any:
    """Checks `problem` as the call of `owner.op` that it is, and runs the form that serves it.

    The output in q's dtype, and the state with `return_state`. A mechanism checks what is its
    own before. `finish` takes the solution to the output where that is not `solution.out`, in
    the compute dtype.
    """
    op = owner.op
    # A call like one before it, in C or as kernels.
    signature, repeated = native_again.signature(op, problem, state, return_state, impl), None
    if signature is not None:
        solution = native_again.served(signature, problem, state)
        if solution is not None:
            out = solution.out if finish is None else finish(solution)
            return _answer(owner, out, solution, state, problem.k.shape[2], return_state)
    elif finish is None:
        repeated = again.signature(op, problem, state, return_state, impl)
        out = None if repeated is None else again.served(repeated, problem)
        if out is not None:
            return out
    q, k, v = cast_for_autocast(problem.q, problem.k, problem.v)
    problem = problem._replace(q=q, k=k, v=v)
    sizes = check(owner, problem, state)
    check_flag(op, "return_state", return_state)
    if state is not None:
        z = state["z"] if problem.normaliser is not None else None
        problem = problem._replace(S=state["S"], z=z)
    scale = problem.scale
    if problem.normaliser == "sum":  # a factor of all weights cancels
        problem = problem._replace(scale=None)
    problem = problem._replace(wants_state=return_state)
    form = choose(op, owner.forms, impl, problem)
    if signature is not None and form.impl == "native":
        native_again.remember(signature, problem, form)
    with without_autocast(q):
        solution = form.run(problem)
        out = solution.out if finish is None else finish(solution)
        if problem.normaliser == "sum" and isinstance(scale, Tensor):
            out = out + 0.0 * scale.to(out.dtype).reshape(-1, 1, 1)  # and so does its gradient
        out = out.to(q.dtype)
    if repeated is not None and form.impl == "triton":
        again.remember(repeated, problem)
    return _answer(owner, out, solution, state, sizes.S, return_state)


def _answer(
    owner: Mechanism,
    out: Tensor,
    solution: Solution,
    state: FixedState | None,
    tokens: int,
    return_state: bool,
) -> Any:
    if not return_state:
        return out
    kept = {} if solution.S is None else {"S": solution.S}
    if solution.z is not None:
        kept["z"] = solution.z
    length = state.length if state is not None else 0
    return out, FixedState(owner.state_name, length + tokens, kept)


def check(owner: Mechanism, problem: Problem, state: Any) -> Sizes:
    """Everything about a problem that metadata can tell, in the name of the owner's op."""
    op, q = owner.op, problem.q
    sizes = check_qkv(op, q, problem.k, problem.v)
    check_flag(op, "causal", problem.causal)
    check_scale(op, problem.scale, sizes, q)
    check_key_mask(op, problem.key_mask, sizes, q)
    width = problem.key_map.width(sizes.D)
    per_key: tuple[int | tuple[int, ...], ...] = (sizes.B, (1, sizes.Hk), sizes.S)
    log_decay = problem.log_decay
    channels = owner.per_channel and isinstance(log_decay, Tensor) and log_decay.dim() == 4
    check_float_operand(op, "log_decay", log_decay, (*per_key, width) if channels else per_key, q)
    check_float_operand(op, "beta", problem.beta, per_key, q)
    if problem.chunk is not None:
        check_integer(op, "chunk_size", problem.chunk)
    check_packed(op, problem.cu_seqlens, problem.cu_seqlens_k, sizes)
    rows = sizes.B if problem.cu_seqlens is None else len(problem.cu_seqlens) - 1
    shapes: dict[str, tuple[int, ...]] = {"S": (rows, sizes.Hk, width, sizes.Dv)}
    if problem.normaliser is not None:
        shapes["z"] = shapes["S"][:3]
    check_fixed(op, owner.state_name, state, shapes, sizes, q, problem.causal)
    return sizes
