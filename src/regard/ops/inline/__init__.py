"""InLine attention: linear attention whose weights are normalised by subtraction (injective)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import (
    Sizes,
    check_choice,
    check_flag,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
    check_state,
    reject,
    words,
)
from regard.core.dispatch import choose
from regard.core.packed import check_packed, spans
from regard.core.precision import cast_for_autocast, compute_dtype
from regard.core.state import FixedState
from regard.ops.inline.features import FEATURE_MAPS
from regard.ops.inline.forms import FORMS, STATE, Call

__all__ = ["FEATURE_MAPS", "inline_attention"]

_OP = "inline_attention"


def inline_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    feature_map: str = "identity",
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Injective linear attention: weights lose their mean instead of being divided by their sum.

        s_ij = scale phi(q_i) . phi(k_j)
        w_ij = (s_ij - mean_j s_ij + 1) / n,    o_i = sum_j w_ij v_j

    over the n keys that query i sees. Rows sum to 1 and may be negative. No weight depends on a
    divisor, so different queries have different rows (unless they differ by a vector orthogonal
    to all centred keys), where the usual normalisation makes one row of q and 2 q. Equivalently

        o_i = mean v + scale cov(v, k) phi(q_i)

    the mean value, corrected by the covariance of values and keys: one matrix serves all queries.

    The paper's form sees all keys of an image. Cross attention, with means over the keys, and the
    causal form, with running means, are extensions; the scale then contains 1 / n with n the keys
    seen so far.

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. With `causal` and T != S the last query stands at the last key (torch's SDPA aligns the
    first ones); queries before the first key give 0, as does any query with no key at all.

    Args:
        feature_map: phi, elementwise: "identity" (of the published models), "relu", "leaky_relu"
            (slope 0.01), or "exp", which is exp(0.2 x), constant from x = 200 on.
        scale: a number or a tensor [], or one per head [H]. None is D ** -0.5.
        key_mask: bool [B, S], True = real key; n and the means count real keys. What a masked
            key holds reaches no value and no gradient.
        cu_seqlens, cu_seqlens_k: int32 [n + 1] boundaries of packed sequences, with B = 1; the
            second for the keys, where they differ. The boundaries are read on the host; a state
            then has a row per sequence.
        chunk_size: tokens per chunk of the chunked form; changes results by rounding only.
        state: what an earlier call returned: its tokens come before these. key_mask describes
            the new keys.
        return_state: also return the state: `S` [B, Hk, D, Dv], the sum of products of centred
            keys and values, `k_mean` [B, Hk, D], `v_mean` [B, Hk, Dv] and `count` [B], int64.
        impl: "auto", "eager", "native", "triton" or "reference"; `regard.explain` says which
            form serves a call, and why not the others.

    Precision: sums and states in float32 (float64 for float64 inputs), of keys and values about
    their means, so that neither an offset of all keys nor 16-bit inputs cost digits or overflow.
    Cost: O((T + S) D Dv) time, with `causal` O(T C (D + Dv)) more in chunks of C;
    O(T (D + Dv)) memory, the backward pass included.
    Source: Han et al. 2024, "Bridging the Divide: Reconsidering Softmax and Linear Attention",
    arXiv 2412.06590, and its code, where the factor scale / n is split over k and v instead. The
    authors' layers are matched to 1e-5 in float32, outputs and gradients.
    Limits: the causal form is differentiable once. A state keeps no past: a causal call that
    continues one may have at most one query more than new keys.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> k = torch.tensor([-2.0, 0.0, 2.0]).view(1, 1, 3, 1)
    >>> q = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 3, 1)
    >>> inline_attention(q, k, torch.eye(3)[None, None])[0, 0]  # the weights
    tensor([[ 0.3333,  0.3333,  0.3333],
            [-0.3333,  0.3333,  1.0000],
            [-1.0000,  0.3333,  1.6667]])
    """
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(_OP, q, k, v)
    check_flag(_OP, "causal", causal)
    check_flag(_OP, "return_state", return_state)
    check_choice(_OP, "feature_map", feature_map, FEATURE_MAPS)
    check_scale(_OP, scale, sizes, q)
    check_key_mask(_OP, key_mask, sizes, q)
    if chunk_size is not None:
        check_integer(_OP, "chunk_size", chunk_size)
    check_packed(_OP, cu_seqlens, cu_seqlens_k, sizes)
    rows = sizes.B if cu_seqlens is None else len(cu_seqlens) - 1
    _check_state(state, sizes, rows, q, causal)
    call = Call(
        q, k, v, causal, feature_map, scale, key_mask, chunk_size, state, return_state
    )  # fmt: skip
    form = choose(_OP, FORMS, impl, call)
    if cu_seqlens is None:
        return form.run(call)
    pieces = []
    for row, (t0, t1, s0, s1) in enumerate(spans(_OP, cu_seqlens, cu_seqlens_k, sizes)):
        piece = call.one(
            q[:, :, t0:t1], k[:, :, s0:s1], v[:, :, s0:s1],
            key_mask=None if key_mask is None else key_mask[:, s0:s1],
            state=None if state is None else state._with(lambda x, r=row: x[r : r + 1]),
        )  # fmt: skip
        pieces.append(choose(_OP, FORMS, impl, piece).run(piece))
    if not pieces:
        return form.run(call)
    if not return_state:
        return torch.cat(pieces, 2)
    outputs, states = zip(*pieces, strict=True)
    tensors = {name: torch.cat([s[name] for s in states]) for name in states[0].tensors}
    length = (0 if state is None else state.length) + sizes.S
    return torch.cat(outputs, 2), FixedState(STATE, length, tensors)


def _check_state(state: Any, sizes: Sizes, rows: int, q: Tensor, causal: bool) -> None:
    check_state(_OP, state, FixedState)
    if state is None:
        return
    if state.mechanism != STATE:
        raise reject(_OP, "state", f"a state of {_OP}", words(f"one of {state.mechanism}"))
    dtype, Hk = compute_dtype(q.dtype), sizes.Hk
    wanted = {
        "S": ((rows, Hk, sizes.D, sizes.Dv), dtype),
        "k_mean": ((rows, Hk, sizes.D), dtype),
        "v_mean": ((rows, Hk, sizes.Dv), dtype),
        "count": ((rows,), torch.int64),
    }
    if set(state.tensors) != set(wanted):
        accepted, held = ", ".join(wanted), ", ".join(state.tensors)
        raise reject(_OP, "state", f"one that holds {accepted}", words(f"one that holds {held}"))
    for name, (shape, kind) in wanted.items():
        tensor = state[name]
        if tensor.shape != shape or tensor.dtype != kind or tensor.device != q.device:
            accepted = f"{kind} {list(shape)} on {q.device}".removeprefix("torch.")
            raise reject(_OP, f"state[{name!r}]", accepted, tensor)
    if causal and state.length and sizes.T > sizes.S + 1:
        accepted = f"of at most {sizes.S + 1} tokens (the state keeps no past to stand in)"
        raise reject(_OP, "q", accepted, q)
