"""The delta rules over ranks: what a rank leaves of the past is a matrix, found by the op itself.

S <- exp(a_t) (I - beta_t k_t k_t^T) S + beta_t k_t v_t^T is linear in S: the tokens of a rank
turn it into A S + N. N is the state after them from nothing. A is the state after them from the
identity, where all values are zero: D more columns of values, and both come from one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard import ops
from regard.core.precision import compute_dtype
from regard.core.state import FixedState
from regard.parallel.collectives import Group
from regard.parallel.sequence import Encoded, Operands, Rule, attend


def delta_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hk t dv"],
    *,
    beta: Float[Tensor, "b hk t"],
    group: Group = None,
    causal: bool = False,
    normalise_keys: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b t"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """`regard.ops.delta_attention` of one sequence whose tokens lie on many ranks.

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    over all tokens of all ranks, in the order of the ranks. Rank p turns the state that reaches
    it into A_p S + N_p with a matrix A_p [D, D] for each head, which is what the op makes of an
    identity when it writes zeros; one all_gather of these pairs tells every rank the state that
    it begins with.

    Shapes, arguments, gradients, limits: as `regard.parallel.linear_attention`; beta is this
    rank's part.

    Precision: as the op. Products of A_p are contractions for 0 <= beta |k|^2 <= 2.
    Cost: O(n D Dv) time a rank and O(n D (D + Dv)) to form A_p and N_p, about one more forward,
    plus O(ranks D D Dv). Each rank receives (ranks - 1) B Hk D (D + Dv) numbers in the forward
    pass and (ranks - 1) B Hk D Dv in the backward pass, however long the sequence is.
    Source: the rule is that of `regard.ops.delta_attention`; its composition over segments is
    linear algebra. Equal to one process to 1e-10 in float64, gradients to 1e-8.
    Raises: ValueError, TypeError for arguments that do not fit; RuntimeError without
    `torch.distributed`.
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, operands: Operands, causal: bool,
        state: FixedState | None, return_state: bool, cu_seqlens: Tensor | None,
        impl: str = impl,
    ) -> Any:  # fmt: skip
        return ops.delta_attention(
            q, k, v, causal=causal, normalise_keys=normalise_keys, scale=scale,
            chunk_size=chunk_size, state=state, return_state=return_state,
            cu_seqlens=cu_seqlens, impl=impl, **operands,
        )  # fmt: skip

    rule = Rule("parallel.delta_attention", run, _encoder("delta", q, run))
    return attend(
        rule, q, k, v, {"key_mask": key_mask, "beta": beta}, group=group, causal=causal,
        cu_seqlens=cu_seqlens, state=state, return_state=return_state,
    )  # fmt: skip


def gated_delta_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hk t dv"],
    *,
    beta: Float[Tensor, "b hk t"],
    log_decay: Float[Tensor, "b hk t"],
    group: Group = None,
    causal: bool = False,
    normalise_keys: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b t"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """`regard.ops.gated_delta_attention` of one sequence whose tokens lie on many ranks.

        S_t = exp(a_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    as `regard.parallel.delta_attention`, with a_t = `log_decay`: the matrix that a rank leaves
    of the past contains its decays.

    Shapes, arguments, gradients, limits: as `regard.parallel.linear_attention`; beta and
    log_decay are this rank's part.

    Precision, cost, bytes: as `regard.parallel.delta_attention`.
    Source: the rule is that of `regard.ops.gated_delta_attention`. Equal to one process to
    1e-10 in float64, gradients to 1e-8.
    Raises: ValueError, TypeError for arguments that do not fit; RuntimeError without
    `torch.distributed`.
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, operands: Operands, causal: bool,
        state: FixedState | None, return_state: bool, cu_seqlens: Tensor | None,
        impl: str = impl,
    ) -> Any:  # fmt: skip
        return ops.gated_delta_attention(
            q, k, v, causal=causal, normalise_keys=normalise_keys, scale=scale,
            chunk_size=chunk_size, state=state, return_state=return_state,
            cu_seqlens=cu_seqlens, impl=impl, **operands,
        )  # fmt: skip

    operands = {"key_mask": key_mask, "beta": beta, "log_decay": log_decay}
    rule = Rule("parallel.gated_delta_attention", run, _encoder("gated_delta", q, run))
    return attend(
        rule, q, k, v, operands, group=group, causal=causal,
        cu_seqlens=cu_seqlens, state=state, return_state=return_state,
    )  # fmt: skip


def _encoder(mechanism: str, q: Tensor, run: Callable[..., Any]) -> Callable[..., Encoded]:
    """N and A side by side: values beside zeros, nothing (or the state) beside an identity."""

    def encode(k: Tensor, v: Tensor, operands: Operands, state: FixedState | None) -> Encoded:
        (B, Hk, _, D), Dv = k.shape, v.shape[3]
        eye = torch.eye(D, dtype=compute_dtype(k.dtype), device=k.device).expand(B, Hk, D, D)
        start = eye.new_zeros(B, Hk, D, Dv) if state is None else state["S"]
        begun = FixedState(mechanism, 0, {"S": torch.cat([start, eye], 3)})
        values = pad(v, (0, D))
        _, after = run(q[:, :, :0], k, values, operands, True, begun, True, None, impl="auto")
        own, left = after["S"].split([Dv, D], 3)
        return Encoded(FixedState(mechanism, 0, {"S": own}), left, transition=True)

    return encode
