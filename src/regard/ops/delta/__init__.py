"""Delta-rule attention: a linear state that corrects what it holds for a key, not adds to it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.state import FixedState
from regard.ops.delta.forms import OWNER
from regard.ops.delta.transformers_names import chunk_delta_rule, fused_recurrent_delta_rule
from regard.ops.linear.delta import attend_by_delta, keys_of, scale_of
from regard.ops.linear.problem import Problem

__all__ = ["chunk_delta_rule", "delta_attention", "fused_recurrent_delta_rule"]


def delta_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    beta: Float[Tensor, "b hk s"],
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
    """Delta-rule attention (DeltaNet): every token corrects what the state answers to its key.

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,    o_t = scale S_t^T q_t

    One step of gradient descent of size beta_t on |v_t - S^T k_t|^2 / 2 from token to token, so
    an old value of the same key is overwritten where linear attention would add to it: wholly
    at beta = 1, not at all at 0. With `causal` a query reads the state after its own key;
    without, every query reads the state after the last one, in whose order the keys count.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        beta: [B, 1 | Hk, S], usually in (0, 1); the rule is stable for 0 <= beta |k|^2 <= 2,
            and between 1 and 2 it overshoots (negative eigenvalues). Any floating dtype.
        normalise_keys: divide every key by its norm (exactly, no epsilon; a zero key stays
            zero). Queries are left as they are: their size scales the output.
        scale: multiplies q: a number or a tensor [], or one per head [H]. None is D ** -0.5, as
            in the authors' kernels (the paper has none).
        key_mask: bool [B, S], True = real key. A masked key writes nothing; what it holds
            reaches no value and no gradient.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host.
        chunk_size: tokens per chunk of the chunked form; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these. key_mask and beta
            describe the new keys.
        return_state: also return the state, `{"S": [B, Hk, D, Dv]}`.
        impl: "auto", "triton", "native", "eager" or "reference".

    Precision: sums and states in float32 (float64 for float64 inputs).
    Cost: O((T + S) D Dv) time, plus O(S C (C + D + Dv)) in chunks of C, solved by forward
    substitution; O((T + S) (D + Dv)) memory, the backward pass included, which recomputes the
    states.
    Source: Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers", arXiv
    2102.11174; chunks after Yang et al. 2024, arXiv 2406.06484. All forms agree with the rule
    token by token to 1e-10 in float64, and gradients to 1e-8.
    Limits: the chunked form is differentiable once. A state keeps no past: a causal call that
    continues one may have at most one query more than new keys. Without `normalise_keys`, keys
    with beta |k|^2 > 2 make the state grow exponentially, as the rule says, until it overflows:
    NaN from that token on, and not before.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> k = torch.eye(2)[[0, 1, 0]].view(1, 1, 3, 2)  # the third key is the first one again
    >>> v = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1)
    >>> beta = torch.ones(1, 1, 3)
    >>> delta_attention(k, k, v, beta=beta, causal=True, scale=1.0).flatten()
    tensor([1., 2., 5.])
    """
    problem = Problem(
        q, k, v, causal, key_map=keys_of(normalise_keys), scale=scale_of(q, scale),
        key_mask=key_mask, beta=beta, chunk=chunk_size, cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    return attend_by_delta(OWNER, problem, ("beta",), normalise_keys, state, return_state, impl)
