"""The delta rule behind `delta_attention` and `gated_delta_attention`: their checks and problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.core.checks import check_flag, reject
from regard.core.precision import compute_dtype
from regard.core.state import FixedState
from regard.ops.linear.attend import Mechanism, attend
from regard.ops.linear.features import UNIT
from regard.ops.linear.problem import IDENTITY, Feature, Problem


def attend_by_delta(
    owner: Mechanism,
    problem: Problem,
    required: tuple[str, ...],
    normalise_keys: bool,
    state: FixedState | None,
    return_state: bool,
    impl: str,
) -> Any:
    """Runs a problem with `beta` under the delta rule; `required` names its required operands.

    Tokens correct what the state holds for their key: u_t = beta_t (v_t - S^T k_t).
    """
    if normalise_keys is not True:
        check_flag(owner.op, "normalise_keys", normalise_keys)
    for name in required:
        if not isinstance(getattr(problem, name), Tensor):
            raise reject(owner.op, name, "a torch.Tensor", getattr(problem, name), kind=TypeError)
    return attend(owner, problem, state=state, return_state=return_state, impl=impl)


def keys_of(normalise_keys: bool) -> Feature:
    """The map of keys."""
    return UNIT if normalise_keys is True else IDENTITY


def scale_of(q: Any, scale: Any) -> Any:
    """D ** -0.5 where no scale is given; what is no tensor is left to the checks."""
    if scale is None and isinstance(q, Tensor) and q.dim() and q.shape[-1]:
        return q.shape[-1] ** -0.5
    return scale


def operands(problem: Problem, state: FixedState | None) -> dict[str, Any]:
    """What every reference of the delta rule takes by name."""
    return {
        "beta": problem.beta, "causal": problem.causal,
        "normalise_keys": problem.key_map.name == "unit", "scale": problem.scale,
        "key_mask": problem.key_mask, "state": state, "return_state": True,
    }  # fmt: skip


def _guarded_unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


GUARDED_UNIT = Feature("unit:1e-6", _guarded_unit, keeps_zero=True)


def attend_by_rule(
    owner: Mechanism,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The causal delta rule on [B, T, H, D], with states that are plain tensors [B, H, D, Dv].

    With `use_qk_l2norm_in_kernel`, queries and keys are divided by their norm with 1e-6 under
    the root. Always a tuple: the output, and the state if `output_final_state`, else None.
    """
    for name, flag in (
        ("output_final_state", output_final_state),
        ("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel),
    ):
        check_flag(owner.op, name, flag)
    for name, tensor, axes in (
        ("query", query, 4), ("key", key, 4), ("value", value, 4), ("g", g, 3), ("beta", beta, 3),
    ):  # fmt: skip
        if tensor is None and name == "g" and "gated" not in owner.state_name:
            continue
        if not isinstance(tensor, Tensor) or tensor.dim() != axes:
            accepted = f"a tensor of {axes} axes [batch, length, heads{', channels' * (axes == 4)}]"
            raise reject(owner.op, name, accepted, tensor, kind=TypeError)
    q, k, v, strength = (x.transpose(1, 2) for x in (query, key, value, beta))
    feature = GUARDED_UNIT if use_qk_l2norm_in_kernel else IDENTITY
    state = None
    if initial_state is not None:
        if not isinstance(initial_state, Tensor):
            raise reject(owner.op, "initial_state", "a tensor", initial_state, kind=TypeError)
        kept = initial_state.to(compute_dtype(q.dtype))
        state = FixedState(owner.state_name, k.shape[2], {"S": kept})
    problem = Problem(
        q, k, v, True, feature, feature, q.shape[3] ** -0.5 if scale is None else scale,
        log_decay=None if g is None else g.transpose(1, 2), beta=strength, chunk=chunk_size,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out = attend(owner, problem, state=state, return_state=output_final_state, impl=impl)
    if not output_final_state:
        return out.transpose(1, 2).contiguous(), None
    return out[0].transpose(1, 2).contiguous(), out[1]["S"]
