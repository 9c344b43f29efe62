"""Linear attention, and the engine of mechanisms with a state of fixed size.

A mechanism describes its call as a `Problem` (`problem.py`) and hands it to `attend.py`, which
checks it and runs one of the forms that `forms.py` lists. The eager ones walk the recurrence:
`recurrent*.py` token by token, `chunked*.py` in chunks, under the rules of `engine.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import check_choice, check_flag, reject, words
from regard.core.state import FixedState
from regard.ops.linear.attend import attend, mechanism
from regard.ops.linear.features import FEATURES
from regard.ops.linear.problem import Feature, Problem
from regard.ops.linear.reference import linear_attention_reference

__all__ = ["encode", "linear_attention", "read"]

_OP = "linear_attention"


def _reference(problem: Problem, state: FixedState | None) -> Any:
    return linear_attention_reference(
        problem.q, problem.k, problem.v, causal=problem.causal,
        feature_map=problem.key_map.name, normalise=problem.normaliser is not None,
        scale=problem.scale, key_mask=problem.key_mask, log_decay=problem.log_decay,
        state=state, return_state=True,
    )  # fmt: skip


_MECHANISM = mechanism(_OP, "linear", _reference, per_channel=True)


def linear_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    feature_map: str = "elu",
    normalise: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    log_decay: Float[Tensor, "b hk s"] | Float[Tensor, "b hk s d"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Linear attention: the weight of a key is phi(q) . phi(k), so the past is one matrix.

        S_t = exp(a_t) S_{t-1} + phi(k_t) v_t^T,   z_t = exp(a_t) z_{t-1} + phi(k_t)
        o_t = phi(q_t)^T S_t / phi(q_t)^T z_t      (numerator only without `normalise`)

    with phi(x) = 1 + elu(x), or x, and a_t = `log_decay` (0 if not given). Every query reads
    the state after the last key; with `causal`, the state after its own key.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        feature_map: "elu" is 1 + elu(x), always positive; "identity" is x, which needs
            `normalise=False`, as a sum of products of either sign may vanish.
        normalise: divide by the sum of weights. No epsilon is added to it.
        scale: multiplies phi(q): a number or a tensor [], or one per head [H]. None is 1, the
            paper's choice; it cancels where the output is normalised.
        key_mask: bool [B, S], True = real key. A masked key writes nothing and advances no
            decay; what it holds reaches no value and no gradient.
        log_decay: [B, 1 | Hk, S], or per channel of the key [B, 1 | Hk, S, D], at most 0: the
            logarithm of what each token multiplies the past by before it writes. Minus infinity
            (and any step below -1000, whose exponential is 0 in float64 too) forgets exactly.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host. States
            then have one row per sequence.
        chunk_size: tokens per chunk of the chunked form (per channel: the next power of two);
            changes results by rounding only.
        state: what an earlier call returned: its tokens come before these. key_mask and
            log_decay describe the new keys.
        return_state: also return the state, `{"S": [B, Hk, D, Dv], "z": [B, Hk, D]}`, z only
            if normalised.
        impl: "auto", "eager" or "reference".

    Precision: sums and states in float32 (float64 for float64 inputs); sums of log_decay in
    float64, and no power of a decay is formed, so none overflows.
    Cost: O((T + S) D Dv) time, plus O(T C (D + Dv)) in chunks of C, times log2 C for decays per
    channel; O(T (D + Dv)) memory, the backward pass included, which recomputes the states.
    Source: Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236, and its code,
    which adds 1e-6 to the normaliser and has no decay. Every form agrees with the explicit
    recurrence to 1e-10 in float64. Identity features with a constant decay are Lightning
    Attention: its kernels' outputs and gradients are matched to 3e-5 and 1e-4 in float32.
    Limits: the causal form is differentiable once. A state keeps no past: a causal call that
    continues one may have at most one query more than new keys.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 6, 4)
    >>> whole = linear_attention(q, k, v, causal=True)
    >>> first, state = linear_attention(
    ...     q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, return_state=True)
    >>> last = linear_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True, state=state)
    >>> torch.allclose(whole, torch.cat([first, last], 2), atol=1e-5)
    True
    """
    phi = _feature(_OP, feature_map, normalise)
    problem = Problem(
        q, k, v, causal, phi, phi, scale, key_mask, log_decay,
        normaliser="sum" if normalise else None, chunk=chunk_size,
        cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    return attend(_MECHANISM, problem, state=state, return_state=return_state, impl=impl)


def encode(
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    feature_map: str = "elu",
    normalise: bool = True,
    key_mask: Bool[Tensor, "b s"] | None = None,
    log_decay: Float[Tensor, "b hk s"] | Float[Tensor, "b hk s d"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    state: FixedState | None = None,
    impl: str = "auto",
) -> FixedState:
    """The state of linear attention after all keys: a memory that any number of queries may read.

        S = sum_j w_j phi(k_j) v_j^T,   z = sum_j w_j phi(k_j),   w_j: the decay from j to the end

    A non-causal call in two halves: `read(q, encode(k, v))` is `linear_attention(q, k, v)`, for
    a memory that is read more than once, or grows: keys and values of any chunk of it may be
    encoded on top of the `state` of what came before.

    Shapes: k [B, Hk, S, D], v [B, Hk, S, Dv] -> `{"S": [B, Hk, D, Dv], "z": [B, Hk, D]}`, z only
    if normalised; with packed sequences, one row for each.

    Args: as of `linear_attention`; `cu_seqlens` are the boundaries of the keys.

    Precision: float32 (float64 for float64 inputs). Cost: O(S D Dv) time, O(D Dv) the result.
    Source: as of `linear_attention`.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 6, 4)
    >>> memory = encode(k, v)
    >>> torch.allclose(read(q, memory), linear_attention(q, k, v), atol=1e-6)
    True
    """
    op = "linear.encode"
    for name, tensor in (("k", k), ("v", v)):
        _check_four_axes(op, name, tensor)
    phi = _feature(op, feature_map, normalise)
    problem = Problem(
        k[:, :, :0], k, v, False, phi, phi, None, key_mask, log_decay,
        normaliser="sum" if normalise else None,
        cu_seqlens=None if cu_seqlens is None else torch.zeros_like(cu_seqlens),
        cu_seqlens_k=cu_seqlens,
    )  # fmt: skip
    owner = _MECHANISM._replace(op=op)
    return attend(owner, problem, state=state, return_state=True, impl=impl)[1]


def read(
    q: Float[Tensor, "b h t d"],
    state: FixedState,
    *,
    feature_map: str = "elu",
    normalise: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """What queries find in a memory of linear attention: every query reads the same state.

        o_t = phi(q_t)^T S / phi(q_t)^T z      (numerator only without `normalise`)

    Shapes: q [B, H, T, D] and a state of `encode`, or of `linear_attention`, with S
    [B, Hk, D, Dv] -> [B, H, T, Dv]; H a multiple of Hk.

    Args: as of `linear_attention`: feature_map and normalise must be those of the state.

    Precision: float32 (float64 for float64 inputs). Cost: O(T D Dv).
    Source: as of `linear_attention`.
    Raises: ValueError, TypeError for arguments that do not fit, as a state of another mechanism.

    >>> import torch
    >>> k, v = torch.randn(2, 1, 2, 6, 4)
    >>> read(torch.randn(1, 4, 9, 4), encode(k, v)).shape
    torch.Size([1, 4, 9, 4])
    """
    op = "linear.read"
    _check_four_axes(op, "q", q)
    if not isinstance(state, FixedState):
        raise reject(op, "state", "a FixedState", state, kind=TypeError)
    if state.mechanism != "linear" or "S" not in state.tensors:
        raise reject(op, "state", "a state of linear attention", words(f"one of {state.mechanism}"))
    phi, (B, Hk, _, Dv) = _feature(op, feature_map, normalise), state["S"].shape
    k, v = q.new_empty(B, Hk, 0, q.shape[3]), q.new_empty(B, Hk, 0, Dv)
    problem = Problem(
        q, k, v, False, phi, phi, scale, normaliser="sum" if normalise else None
    )  # fmt: skip
    return attend(_MECHANISM._replace(op=op), problem, state=state, impl=impl)


def _feature(op: str, feature_map: str, normalise: bool) -> Feature:
    check_flag(op, "normalise", normalise)
    check_choice(op, "feature_map", feature_map, FEATURES)
    if normalise and feature_map == "identity":
        accepted = "False with feature_map='identity', whose sum of weights may vanish"
        raise reject(op, "normalise", accepted, normalise)
    return FEATURES[feature_map]


def _check_four_axes(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise reject(op, name, "a torch.Tensor", value, kind=TypeError)
    if value.dim() != 4:
        raise reject(op, name, "4-dimensional [batch, heads, length, channels]", value)
