"""Hedgehog with a softmax window: exact for recent keys, linear for older ones. The files:

- `call.py`: what was asked, checked here
- `chunked.py`: both parts in chunks of queries
- `reference.py`: the equations
- `analysis.py`: the whole matrix of weights
- `forms.py`, `card.py`
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.dispatch import choose
from regard.core.packed import run_packed, spans
from regard.core.precision import cast_for_autocast
from regard.core.state import FixedState
from regard.ops.hedgehog_window.analysis import hedgehog_window_weights
from regard.ops.hedgehog_window.call import OP, Call, check
from regard.ops.hedgehog_window.forms import FORMS

__all__ = ["hedgehog_window_attention", "hedgehog_window_weights"]


def hedgehog_window_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    map_q: Float[Tensor, "#h d f"] | None = None,
    map_k: Float[Tensor, "#hk d f"] | None = None,
    bias_q: Float[Tensor, " #h *f"] | None = None,
    bias_k: Float[Tensor, " #hk *f"] | None = None,
    activation: Literal[
        "softmax_dim", "exp_dim", "joint_softmax", "relu", "pos_elu"
    ] = "softmax_dim",
    full_space: bool = True,
    skip: bool = False,
    window_length: int = 64,
    layout: Literal["sliding", "terraced"] = "sliding",
    align: Literal["start", "end"] = "start",
    gamma: float | Float[Tensor, ""] | Float[Tensor, " h"] = 0.1,
    affine: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    causal: bool = True,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Softmax attention to a window of recent keys, learned linear attention to all older ones.

        s_ij = scale q_i . k_j,    m_i = max of s_i over the window W_i
        w_ij = gamma exp(s_ij - m_i) in W_i,   beta phi_q(q_i) . phi_k(k_j) before it
        o_i  = sum_j w_ij v_j / sum_j w_ij                  (one normaliser for both parts)

    beta is 1, or 1 - gamma if `affine`. The shift m_i bounds the weights of the window by gamma:
    it is part of the definition and does not cancel. With w = `window_length`, query i at place
    p_i = i + S - T (aligned at the end) has the window

        sliding     the last w keys, its own included
        terraced    its own block of w keys, up to itself, and the whole block before

    A sequence that fits into the window is softmax attention, whatever gamma is.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. Queries before the first key give 0, as does any query with no key at all.

    Args:
        map_q, map_k, bias_q, bias_k, activation, full_space, skip: the feature maps phi, as of
            `hedgehog_attention`; "exp" is refused, as its weights have no bound to be weighed
            against.
        align: where blocks are counted from. "start": the first key, so that a token's
            weights do not depend on what follows. "end": the last key, as the authors' code,
            where the first block is the short one; no state and no key_mask then. The same
            where w divides S.
        gamma: weight of the window: a number in [0, 1] or a tensor [], or one per head [H].
        scale: of the softmax scores, None: D ** -0.5; a number or a tensor [], or one per head
            [H]. The features have none.
        causal: True only: without an order there are no recent keys.
        key_mask: bool [B, S], True = real key. A masked key is seen by nobody, whatever it
            holds, and takes no place: a window is one of real keys.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host.
        chunk_size: queries per chunk; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these.
        return_state: also return the state: S [B, Hk, F, Dv] and z [B, Hk, F], the sums over keys
            that have left the window, the last w (terraced: 2w) keys and values `k` and `v`,
            `real` [B, w], and `phase` [B], the tokens since the first real key.
        impl: "auto", "eager" or "reference".

    Precision: in float32 (float64 for float64 inputs), states included.
    Cost: O(T (w (D + F + Dv) + F Dv)) time, memory O(T (w + F + Dv)) with gradients; a decoding
        step O(w (D + Dv) + F Dv), whatever came before.
    Source: Zhang et al. 2024, "LoLCATs: On Low-Rank Linearizing of Large Language Models", arXiv
        2410.10254, and its code: outputs matched to 5e-5, weights and losses to 1e-5, gradients
        to 1e-3, decoded outputs to 5e-5. Its terraced masks count a sequence shorter than a
        window in both parts; here that is softmax attention.
    Limits: differentiable once, but with impl="reference". A state keeps no past but its window:
        a call that continues one may have at most one query more than new keys. What is
        terraced is decoded terraced (the authors decode it with a sliding window).
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 9, 4)
    >>> whole = hedgehog_window_attention(q, k, v, window_length=4)
    >>> first, state = hedgehog_window_attention(
    ...     q[:, :, :7], k[:, :, :7], v[:, :, :7], window_length=4, return_state=True)
    >>> last = hedgehog_window_attention(
    ...     q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], window_length=4, state=state)
    >>> torch.allclose(whole, torch.cat([first, last], 2), atol=1e-5)
    True
    """
    q, k, v = cast_for_autocast(q, k, v)
    call = Call(
        q, k, v, map_q, map_k, bias_q, bias_k, activation, full_space, skip, window_length, layout,
        align, gamma, affine, scale, causal, key_mask, state, return_state, chunk_size, cu_seqlens,
        cu_seqlens_k,
    )  # fmt: skip
    sizes = check(call)
    form = choose(OP, FORMS, impl, call)
    if cu_seqlens is None:
        return form.run(call)

    def one(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return form.run(call.one(q, k, v, key_mask))

    sequences = spans(OP, cu_seqlens, cu_seqlens_k, sizes)
    return run_packed(one, sequences, q, k, v, {}, {"key_mask": (key_mask, 1)})
