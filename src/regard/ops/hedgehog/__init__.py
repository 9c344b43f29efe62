"""Hedgehog: linear attention whose feature maps are learned to mimic softmax. The files beside it:

- `reference.py`: the equations
- `analysis.py`: the whole matrix of weights, for distillation and for looking at it
- `card.py`: what the rest of the library knows about it

The maps are `regard.ops.linear.learned_features`; the forms are those of the linear engine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import check_number, check_qkv
from regard.core.precision import cast_for_autocast
from regard.core.state import FixedState
from regard.ops.hedgehog.analysis import hedgehog_weights
from regard.ops.hedgehog.reference import hedgehog_attention_reference
from regard.ops.linear.attend import attend, mechanism
from regard.ops.linear.learned_features import CLAMP, check_maps, learned, to_heads
from regard.ops.linear.native.blocks import in_blocks
from regard.ops.linear.problem import Problem

__all__ = ["hedgehog_attention", "hedgehog_weights"]

_OP = "hedgehog_attention"


def _reference(problem: Problem, state: FixedState | None) -> Any:
    of_q, of_k = (dict(m.apply.keywords) for m in (problem.query_map, problem.key_map))  # pyright: ignore
    return hedgehog_attention_reference(
        problem.q, problem.k, problem.v,
        map_q=of_q["weight"], map_k=of_k["weight"], bias_q=of_q["bias"], bias_k=of_k["bias"],
        activation=of_q["activation"], full_space=of_q["full_space"], skip=of_q["skip"],
        epsilon=problem.epsilon, causal=problem.causal, key_mask=problem.key_mask,
        state=state, return_state=True,
    )  # fmt: skip


_MECHANISM = mechanism(_OP, "hedgehog", _reference)
_MECHANISM = _MECHANISM._replace(  # features are wider than what they are made of
    forms=tuple(
        replace(form, run=in_blocks(form.run)) if form.impl == "eager" else form
        for form in _MECHANISM.forms
    )
)


def hedgehog_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    map_q: Float[Tensor, "#h d f"] | None = None,
    map_k: Float[Tensor, "#hk d f"] | None = None,
    bias_q: Float[Tensor, " #h *f"] | None = None,
    bias_k: Float[Tensor, " #hk *f"] | None = None,
    activation: Literal[
        "softmax_dim", "exp_dim", "exp", "joint_softmax", "relu", "pos_elu"
    ] = "softmax_dim",
    full_space: bool = True,
    skip: bool = False,
    epsilon: float | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Linear attention with feature maps that are learned to mimic softmax attention.

        z = x W + b (+ x with `skip`),   phi(x) = activation(z)      (W and b per head, of q and k)
        w_ij = phi_q(q_i) . phi_k(k_j),  o_i = sum_j w_ij v_j / (sum_j w_ij + epsilon)

    over all keys, or with `causal` over j <= i. There is no 1 / sqrt(D): the maps hold it.
    Rotary positions are applied before. The activations, with F channels of z:

        softmax_dim    [softmax(z), softmax(-z)], each over the channels: 2F features in [0, 1]
        exp_dim        [exp(z - max z), exp(min z - z)]; of a key the shift stays in its weight
        exp            [exp(z), exp(-z)], the paper's first form; |z| is limited to 60
        joint_softmax  softmax([2 z, -2 z]) over all 2F, that of flash-linear-attention
        relu           max(z, 0): F features, the map of T2R
        pos_elu        1 + elu(z): F features

    each at least 1e-12 but in exp and joint_softmax; `full_space=False` leaves out the second
    half of the first three.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        map_q: W of queries, [1 | H, D, F]; None: the identity, z = x, where training starts.
        map_k: W of keys, [1 | Hk | H, D, F]. A map for every *query* head, the authors' choice,
            repeats keys and values: the state then has H heads, not Hk.
        bias_q, bias_k: b, one number per head [1 | H] or one per channel [1 | H, F].
        epsilon: added to the sum of weights. None: the authors' 1e-12, and 0 with exp, where a
            factor of the query is divided out, which cancels only without it.
        key_mask: bool [B, S], True = real key. A masked key writes nothing; what it holds
            reaches no value and no gradient.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host.
        chunk_size: tokens per chunk of the chunked form; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these.
        return_state: also return the state, `{"S": [B, Hk, 2F, Dv], "z": [B, Hk, 2F]}`.
        impl: "auto", "native", "eager", "triton" or "reference", as of `linear_attention`.

    Precision: maps, sums and states in float32 (float64 for float64 inputs). Nothing decays, so
        the sums grow with the length: a state in 16 bits would stop growing.
    Cost: O(T F (D + Dv)) time and memory O(T (F + Dv)), the backward pass included.
    Source: Zhang et al. 2024, "The Hedgehog & the Porcupine", arXiv 2402.04347; the activations
        and the epsilon are those of the authors' later code (LoLCATs, arXiv 2410.10254), whose
        causal outputs are matched to 5e-5, weights and losses to 1e-5, gradients to 1e-3; the
        map of flash-linear-attention to 1e-5. Non-causal and cross-attention are as in the paper.
    Limits: differentiable once, but with impl="reference". softmax_dim bounds a weight by 2, so
        that a row can be no sharper than F allows.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 6, 4)
    >>> maps = torch.eye(4).repeat(2, 1, 1)
    >>> out = hedgehog_attention(q, k, v, map_q=maps, map_k=maps, causal=True)
    >>> torch.allclose(out[:, :, 0], v[:, :, 0])
    True
    """
    if epsilon is None:
        epsilon = 0.0 if activation == "exp" else CLAMP
    check_number(_OP, "epsilon", epsilon, least=0.0)
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(_OP, q, k, v)
    maps, biases = (map_q, map_k), (bias_q, bias_k)
    heads = check_maps(_OP, sizes, q, maps, biases, activation, full_space, skip)
    of_q, of_k = (
        learned(weight, bias, activation, full_space, skip, of_queries=queries)
        for weight, bias, queries in zip(maps, biases, (True, False), strict=True)
    )
    problem = Problem(
        q, to_heads(k, heads), to_heads(v, heads), causal, of_q, of_k, None, key_mask,
        normaliser="sum", chunk=chunk_size, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
        epsilon=float(epsilon),
    )  # fmt: skip
    return attend(_MECHANISM, problem, state=state, return_state=return_state, impl=impl)
