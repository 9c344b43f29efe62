"""Exact softmax attention: the function. The files beside it:

- `call.py`: what was asked (`Call`, checked here) and what is to be computed (`Problem`)
- `reference.py`: the equations
- `native.py`, `triton.py`: the kernels of local linear attention on CPUs and GPUs, by `engine.py`
- `sdpa.py`: torch's fused kernels, where they are exact and safe; `fused.py`: their operator
- `blockwise.py`: our own blocks of queries, with every option and any number of derivatives
- `forms.py`: which of them serves a call
- `card.py`: what the rest of the library knows about it
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.cache import KVCache
from regard.core.dispatch import choose
from regard.core.precision import cast_for_autocast, without_autocast
from regard.ops.softmax.call import OP, Call, SoftmaxAux, check, remember, resolve, separate
from regard.ops.softmax.forms import FORMS

__all__ = ["SoftmaxAux", "softmax_attention"]


def softmax_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    causal: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    key_bias: Float[Tensor, " b #h s"] | None = None,
    bias: Float[Tensor, " #b #h #t #s"] | None = None,
    log_decay: Float[Tensor, " b #h s"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    cu_seqlens_k: Int[Tensor, " n"] | None = None,
    block_size: int | None = None,
    state: KVCache | None = None,
    return_state: bool = False,
    return_aux: bool = False,
    impl: str = "auto",
) -> Any:
    """Weighs the values by the softmax of the query-key products: attention, exactly.

    With query i at key position p_i = i + S - T (queries are aligned with the *end* of the keys),

        s_ij = cap(scale q_i . k_j) + key_bias_j + bias_ij + sum_{l=j+1..p_i} log_decay_l
        w_ij = exp(s_ij) / (exp(sink) + sum_j' exp(s_ij'))
        o_i  = sum_j w_ij v_j

    where j runs over the keys that query i sees, cap(x) = softcap tanh(x / softcap) and
    exp(sink) is absent without `sinks`. A query that sees no key gives 0.

    Args:
        q: queries [B, H, T, D].
        k, v: keys [B, Hk, S, D] and values [B, Hk, S, Dv]; H is a multiple of Hk, and query
            head h uses key head h // (H / Hk).
        causal: query i sees keys j <= p_i only. torch's own attention aligns T != S at the start.
        scale: None is D ** -0.5; a number or a tensor [], or one per head [H], differentiable.
        key_mask: bool [B, S], True = real key. A masked key is seen by nobody and decays
            nothing; whatever it contains (NaN too) reaches no value and no gradient.
        key_bias: added to every score of a key, [B, 1 | Hk | H, S].
        bias: added to the scores, broadcast to [B, H, T, S]; -inf hides. With `state`, S counts
            the old keys too.
        log_decay: [B, 1 | Hk | H, S], <= 0: key l multiplies the weight of all older keys by
            exp(log_decay_l), -inf forgets them. Without `causal` every query stands at the
            last key.
        softcap: bounds the products to (-softcap, softcap), before anything is added.
        sinks: [H], a logit per head that takes its share of the softmax and brings no value.
        window: (left, right), how many keys before and after its own position a query sees;
            -1 is without bound. With `causal`, both limits hold.
        cu_seqlens, cu_seqlens_k: int32 offsets [n + 1] of n sequences packed end to end in one
            row (B = 1), of the queries and, where they differ, of the keys. Each sequence is
            computed on its own. Reads the offsets on the host, so it does not compile whole.
        block_size: queries per block of the eager form. Changes nothing but rounding.
        state: the `KVCache` of the tokens so far, whichever op it comes from. k, v, `key_mask`,
            `key_bias` and `log_decay` of this call are those of the new tokens, which are
            appended to it.
        return_state: also return the cache that contains this call's keys.
        return_aux: also return `SoftmaxAux(lse)`, lse_i = log sum_j exp(s_ij) over the keys
            (sinks not counted), [B, H, T], float32 (float64 for float64), -inf without a key.
        impl: "native" is compiled code, with one derivative: on CPUs tiles in plain C where they
            are faster than torch's fused kernel or it cannot serve (key biases, decays), else
            that kernel; neither has softcap, sinks, a dense bias or aux. "eager" is our blocks
            (everything, any number of derivatives), "reference" the plain equations with a
            T x S matrix. "triton" (a GPU, heads of up to 128 channels) serves what native does.
            "auto" takes torch's kernel where it can serve; triton for biases and decays on
            devices where it was verified (`regard.gpu.VERIFIED`: an H100); else eager.

    Returns:
        out [B, H, T, Dv] in q's dtype; or (out, state), (out, aux), (out, state, aux).

    Precision:
        bfloat16 and float16 inputs are summed in float32; under autocast q, k, v are cast to
        its dtype first. float16 on a CPU is computed in float32. Keys that a query does not see
        may hold anything up to 1e30 in magnitude without changing one bit of its output or of
        the gradients that its output sends (float16 excepted, which ends at 65504).

    Cost:
        O(T S D) time; without gradients no T x S tensor is held. With gradients the eager form
        keeps its weights for the backward pass, torch's kernel does not.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, eq. 1. Equal to
        `torch.nn.functional.scaled_dot_product_attention` where that is defined.

    Limits:
        No dropout (it belongs to the layer around). The fused kernel has no second derivative,
        and where a row's own scores exceed about 1e8 no first one (it computes the weights
        again in its backward pass): ask for impl="eager". A state that was continued is
        continued again only after `fork()`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device, packed
            sequences together with `state`, `return_state` or `bias`, or an `impl` that cannot
            serve the call; the message names the argument.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    >>> out = softmax_attention(q, k, v, causal=True)
    >>> torch.equal(out[:, :, 0], v[:, :, 0])
    True
    >>> first, state = softmax_attention(
    ...     q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, return_state=True
    ... )
    >>> last = softmax_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True, state=state)
    >>> torch.allclose(torch.cat([first, last], 2), out, atol=1e-6)
    True
    """
    q, k, v = cast_for_autocast(q, k, v)
    call = Call(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, key_bias=key_bias, bias=bias,
        log_decay=log_decay, softcap=softcap, sinks=sinks, window=window, cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k, block_size=block_size, state=state, return_state=return_state,
        return_aux=return_aux,
    )  # fmt: skip
    check(call)
    form = choose(OP, FORMS, impl, call)
    cache = None
    with without_autocast(q):
        if cu_seqlens is not None:
            out, lse = separate(call, form.run)
        else:
            if state is not None or return_state:
                call, cache = remember(call)
            out, lse = form.run(resolve(call, cache))
    results: list[Any] = [out]
    if return_state:
        results.append(cache)
    if return_aux:
        assert lse is not None  # the forms that keep it have refused
        results.append(SoftmaxAux(lse))
    return tuple(results) if len(results) > 1 else out
