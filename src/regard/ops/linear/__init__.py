"""Linear attention, and the engine of mechanisms with a state of fixed size.

`linear_attention` prepares features and calls `engine.attend`; the forms of the recurrence are
`recurrent.py` and `chunked.py`.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import (
    Sizes,
    check_choice,
    check_flag,
    check_float_operand,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
    check_state,
    reject,
    words,
)
from regard.core.dispatch import choose
from regard.core.packed import check_packed, run_packed, spans
from regard.core.precision import cast_for_autocast, compute_dtype
from regard.core.state import FixedState
from regard.ops.linear.features import FEATURE_MAPS
from regard.ops.linear.forms import FORMS, Call

__all__ = ["linear_attention"]

_OP = "linear_attention"


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
    log_decay: Float[Tensor, "b hk s"] | None = None,
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
        log_decay: [B, 1 | Hk, S], at most 0: the logarithm of what each token multiplies the
            past by before it writes. Minus infinity (and any step below -1000, whose
            exponential is 0 in float64 too) forgets exactly.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host.
        chunk_size: tokens per chunk of the chunked form; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these. key_mask and
            log_decay describe the new keys.
        return_state: also return the state, `{"S": [B, Hk, D, Dv], "z": [B, Hk, D]}`, z only
            if normalised.
        impl: "auto", "eager" or "reference".

    Precision: sums and states in float32 (float64 for float64 inputs); sums of log_decay in
    float64, and no power of a decay is formed, so none overflows.
    Cost: O((T + S) D Dv) time, plus O(T C (D + Dv)) in chunks of C; O(T (D + Dv)) memory, the
    backward pass included, which recomputes the states.
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
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(_OP, q, k, v)
    flags = {"causal": causal, "normalise": normalise, "return_state": return_state}
    for name, flag in flags.items():
        check_flag(_OP, name, flag)
    check_choice(_OP, "feature_map", feature_map, FEATURE_MAPS)
    if normalise and feature_map == "identity":
        accepted = "False with feature_map='identity', whose sum of weights may vanish"
        raise reject(_OP, "normalise", accepted, normalise)
    check_scale(_OP, scale, sizes, q)
    check_key_mask(_OP, key_mask, sizes, q)
    check_float_operand(_OP, "log_decay", log_decay, (sizes.B, (1, sizes.Hk), sizes.S), q)
    if chunk_size is not None:
        check_integer(_OP, "chunk_size", chunk_size)
    _check_state(state, sizes, q, causal, normalise)
    check_packed(_OP, cu_seqlens, cu_seqlens_k, sizes, state)
    if cu_seqlens is not None and return_state:
        raise reject(_OP, "return_state", "False with packed sequences", return_state)
    call = Call(
        q, k, v, causal, feature_map, normalise, scale, key_mask, log_decay,
        chunk_size, state, return_state,
    )  # fmt: skip
    form = choose(_OP, FORMS, impl, call)
    if cu_seqlens is None:
        return form.run(call)

    def one(q: Tensor, k: Tensor, v: Tensor, **operands: Tensor | None) -> Tensor:
        piece = call.one(q, k, v, **operands)
        return choose(_OP, FORMS, impl, piece).run(piece)

    sequences = spans(_OP, cu_seqlens, cu_seqlens_k, sizes)
    operands: dict[str, tuple[Tensor | None, int]]
    operands = {"key_mask": (key_mask, 1), "log_decay": (log_decay, 2)}
    return run_packed(one, sequences, q, k, v, {}, operands)


def _check_state(state: Any, sizes: Sizes, q: Tensor, causal: bool, normalise: bool) -> None:
    check_state(_OP, state, FixedState)
    if state is None:
        return
    if state.mechanism != "linear":
        raise reject(_OP, "state", f"a state of {_OP}", words(f"one of {state.mechanism}"))
    shapes: dict[str, tuple[int, ...]] = {"S": (sizes.B, sizes.Hk, sizes.D, sizes.Dv)}
    if normalise:
        shapes["z"] = shapes["S"][:3]
    if set(state.tensors) != set(shapes):
        accepted = f"one of a call with normalise={normalise}"
        raise reject(_OP, "state", accepted, words(f"one that holds {', '.join(state.tensors)}"))
    for name, shape in shapes.items():
        tensor, dtype = state[name], compute_dtype(q.dtype)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
            accepted = f"{dtype} {list(shape)} on {q.device}".removeprefix("torch.")
            raise reject(_OP, f"state[{name!r}]", accepted, tensor)
    if causal and state.length and sizes.T > sizes.S + 1:
        accepted = f"of at most {sizes.S + 1} tokens (the state keeps no past to stand in)"
        raise reject(_OP, "q", accepted, q)
