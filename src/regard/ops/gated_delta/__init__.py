"""Gated delta-rule attention: the delta rule on a state that also forgets."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.state import FixedState
from regard.ops.gated_delta.forms import OWNER
from regard.ops.gated_delta.transformers_names import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from regard.ops.linear.delta import attend_by_delta, keys_of, scale_of
from regard.ops.linear.problem import Problem

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "gated_delta_attention"]


def gated_delta_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    beta: Float[Tensor, "b hk s"],
    log_decay: Float[Tensor, "b hk s"],
    causal: bool = False,
    normalise_keys: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Gated delta-rule attention (Gated DeltaNet): forget a little, then correct the state.

        S = exp(a_t) S_{t-1},    S_t = S + beta_t k_t (v_t - S^T k_t)^T,    o_t = scale S_t^T q_t

    with a_t = `log_decay`: the past is multiplied by exp(a_t) before the error is formed, so
    S_t = exp(a_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T. The gate clears the whole
    state, the correction one key. With `causal` a query reads the state after its own key;
    without, every query reads the state after the last one, in whose order the keys count.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        beta: [B, 1 | Hk, S], usually in (0, 1); the rule is stable for 0 <= beta |k|^2 <= 2,
            and between 1 and 2 it overshoots (negative eigenvalues). Any floating dtype.
        log_decay: [B, 1 | Hk, S], at most 0. Minus infinity (and any step below -1000, whose
            exponential is 0 in float64 too) forgets exactly.
        normalise_keys: divide every key by its norm (exactly, no epsilon; a zero key stays
            zero). Queries are left as they are: their size scales the output.
        scale: multiplies q: a number or a tensor [], or one per head [H]. None is D ** -0.5, as
            in the authors' kernels (the paper has none).
        key_mask: bool [B, S], True = real key. A masked key writes nothing and advances no
            decay; what it holds reaches no value and no gradient.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host.
        chunk_size: tokens per chunk of the chunked form; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these. key_mask, beta
            and log_decay describe the new keys.
        return_state: also return the state, `{"S": [B, Hk, D, Dv]}`.
        impl: "auto", "triton", "native", "eager" or "reference".

    Precision: sums and states in float32 (float64 for float64 inputs); sums of log_decay in
    float64, and no power of a decay is formed, so none overflows.
    Cost: O((T + S) D Dv) time, plus O(S C (C + D + Dv)) in chunks of C, solved by forward
    substitution; O((T + S) (D + Dv)) memory, the backward pass included, which recomputes the
    states.
    Source: Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv
    2412.06464. Qwen3-Next in transformers, which also normalises the queries and adds 1e-6 under
    the roots, is matched to 1e-5 in float32, its gradients to 1e-4. All forms agree with the
    rule token by token to 1e-10 in float64, gradients to 1e-8.
    Limits: the chunked form is differentiable once. A state keeps no past: a causal call that
    continues one may have at most one query more than new keys. Without `normalise_keys`, keys
    with beta |k|^2 > 2 make the state grow exponentially, as the rule says, until it overflows:
    NaN from that token on, and not before.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> k = torch.eye(2)[[0, 1, 0]].view(1, 1, 3, 2)  # the third key is the first one again
    >>> v = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1)
    >>> beta, half = torch.full((1, 1, 3), 0.5), torch.full((1, 1, 3), 0.5).log()
    >>> gated_delta_attention(
    ...     k, k, v, beta=beta, log_decay=half, causal=True, scale=1.0).flatten()
    tensor([0.5000, 1.0000, 2.5625])
    """
    problem = Problem(
        q, k, v, causal, key_map=keys_of(normalise_keys), scale=scale_of(q, scale),
        key_mask=key_mask, log_decay=log_decay, beta=beta, chunk=chunk_size,
        cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    return attend_by_delta(
        OWNER, problem, ("beta", "log_decay"), normalise_keys, state, return_state, impl
    )
