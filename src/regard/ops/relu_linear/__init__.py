"""Linear attention of ReLU features whose sum of weights is clamped from below (L2ViT)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import check_number, check_per_head, check_qkv
from regard.core.precision import cast_for_autocast
from regard.core.state import FixedState
from regard.ops.linear.attend import attend, mechanism
from regard.ops.linear.features import RELU
from regard.ops.linear.problem import Problem, Solution
from regard.ops.relu_linear.reference import relu_linear_attention_reference

__all__ = ["relu_linear_attention"]

_OP = "relu_linear_attention"


def _reference(problem: Problem, state: FixedState | None) -> Any:
    return relu_linear_attention_reference(
        problem.q, problem.k, problem.v, causal=problem.causal, temperature=1.0,
        minimum=problem.minimum or 0.0, key_mask=problem.key_mask, state=state, return_state=True,
    )  # fmt: skip


_MECHANISM = mechanism(_OP, "relu_linear", _reference)


def relu_linear_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    temperature: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    minimum: float = 100.0,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Linear attention of ReLU features, divided by the sum of weights or by 100 if that is more.

        w_ij = relu(q_i) . relu(k_j),    o_i = temperature sum_j w_ij v_j / max(sum_j w_ij, minimum)

    Weights of a row sum to temperature min(1, sum_j w_ij / minimum): the temperature is a gain of
    the output, and a query with little weight gives little instead of an average. The sum grows
    with the number of keys, so the same layer is normalised on a large image and hardly on a small
    one. With `minimum=0` it is plain linear attention with ReLU features.

    The paper's form sees all keys, of an image; the causal form, where the clamp applies to the
    sum so far, is an extension.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        temperature: multiplies the output: a number or a tensor [], or one per head [H]. None is
            D ** -0.5, from where the authors' models learn it.
        minimum: of the sum of weights, at least 0. The published models have 100.
        key_mask: bool [B, S], True = real key. What a masked key holds reaches no value and no
            gradient.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. A state then has a row per sequence.
        chunk_size: tokens per chunk of the chunked form; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these. key_mask describes
            the new keys.
        return_state: also return the state, `{"S": [B, Hk, D, Dv], "z": [B, Hk, D]}`.
        impl: "auto", "eager", "native", "triton" or "reference"; `regard.explain` says which
            form serves a call, and why not the others.

    Precision: sums and states in float32 (float64 for float64 inputs).
    Cost: O((T + S) D Dv) time, with `causal` O(T C (D + Dv)) more in chunks of C;
    O(T (D + Dv)) memory, the backward pass included.
    Source: Zheng 2025, "The Linear Attention Resurrection in Vision Transformer", arXiv
    2501.16182, and its code, which does the same; its layer's outputs and gradients are matched
    to 1e-5 in float32, with sums of weights on both sides of the clamp.
    Limits: the causal form is differentiable once. A state keeps no past: a causal call that
    continues one may have at most one query more than new keys.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.full((3, 1, 1, 1, 1), 2.0)
    >>> relu_linear_attention(q, k, v, temperature=1.0)  # a weight of 4, a twenty-fifth of 100
    tensor([[[[0.0800]]]])
    >>> relu_linear_attention(q, k, v, temperature=1.0, minimum=0.0)
    tensor([[[[2.]]]])
    """
    check_number(_OP, "minimum", minimum, least=0.0)
    q, k, v = cast_for_autocast(q, k, v)
    if isinstance(temperature, Tensor):
        check_per_head(_OP, "temperature", temperature, check_qkv(_OP, q, k, v), q)
    elif temperature is not None:
        check_number(_OP, "temperature", temperature)
    problem = Problem(
        q, k, v, causal, RELU, RELU, key_mask=key_mask, normaliser=float(minimum) or "sum",
        chunk=chunk_size, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip

    def finish(solution: Solution) -> Tensor:
        out = solution.out
        if isinstance(temperature, Tensor):
            return out * temperature.to(out.dtype).reshape(-1, 1, 1)
        gain = q.shape[3] ** -0.5 if temperature is None else temperature
        return out * gain if out.requires_grad else out.mul_(gain)

    return attend(
        _MECHANISM, problem, state=state, return_state=return_state, impl=impl, finish=finish
    )
