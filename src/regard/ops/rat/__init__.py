"""RAT: a gated recurrence inside of chunks, softmax attention over the chunks. The files:

- `call.py`: what was asked (`Call`), and its checks
- `reference.py`: the equations
- `grid.py`: tokens laid out in chunks behind the state, masked ones left out; the state after
- `scan.py`, `attend.py`: the two steps in eager torch; `registered.py`: both as operators
- `native/`: both in plain C; `step.py`: one token behind a state
- `forms.py`: which of them serves a call
- `card.py`: what the rest of the library knows about it
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.dispatch import choose
from regard.core.packed import run_packed, spans
from regard.core.precision import cast_for_autocast
from regard.core.state import FixedState
from regard.ops.rat.call import OP, Call, check
from regard.ops.rat.forms import FORMS

__all__ = ["rat_attention"]


def rat_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s d"],
    gate: Float[Tensor, "b hk s d"],
    *,
    chunk_length: int | None = 16,
    causal: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    rope: bool | float = False,
    key_mask: Bool[Tensor, "b s"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """Softmax attention over chunks, each of which a gated recurrence has averaged into one key.

    Token t is number l = t mod L of chunk c = t div L. Inside a chunk, channel by channel,

        k~_t = g_t k~_{t-1} + (1 - g_t) k_t,   v~_t = g_t v~_{t-1} + (1 - g_t) v_t

    from 0 at its first token. A query sees the last k~ of every chunk before its own, and its
    own k~ so far:

        o_t = sum_{j < c} p_j v~_{jL+L-1} + p_t v~_t,   p = softmax(scale q_t . k~)

    With `rope`, q_t and k~ are turned by rotary angles of the number of their chunk. L = 1 and a
    gate of 0 are softmax attention; one chunk for all tokens is a gated recurrent network.

    Shapes: q [B, H, T, D], k, v and gate [B, Hk, S, D] -> [B, H, T, D]; H a multiple of Hk. With
    T != S the last query stands at the last key (torch's SDPA aligns the first ones); queries
    before the first key give 0.

    Args:
        gate: in [0, 1], per channel and shared by keys and values: what is kept of the past at
            each token. May be float32 beside q, k and v of 16 bits, and should be.
        chunk_length: L. None: a single chunk that never ends; then o_t = v~_t, whatever q and
            k are.
        causal: only True, a recurrence looks back.
        scale: None is D ** -0.5; a number or a tensor [], or one per head [H], differentiable.
        rope: True is a base of 10000, a number is the base, False is without positions. D even.
        key_mask: bool [B, S], True = real key. A masked token does not exist: chunks are counted
            in real tokens, so padding may stand on either side or in between; what it holds
            reaches no value and no gradient. A query there reads what its predecessor reads.
        cu_seqlens: int32 offsets [n + 1] of n sequences packed end to end in one row (B = 1),
            each computed on its own. Reads the offsets on the host.
        state: of the tokens so far, from the same `chunk_length` and `rope`; k, v, gate and
            key_mask are those of the new tokens, and of queries at most one more.
        return_state: also return the state: `ends_k` (turned) and `ends_v`, one of each finished
            chunk [B, Hk, chunks, D] in q's dtype; `k` and `v`, the running ones [B, Hk, D]; and
            `count` [B], real tokens, once a key_mask was given.
        impl: "native" is plain C on a CPU (float32 inside), "eager" blocks of torch operations
            on any device, "reference" the equations token by token.

    Returns:
        out [B, H, T, D] in q's dtype, or (out, state).

    Precision:
        Recurrence, scores and sums in float32 (float64 for float64 inputs, eager). The recurrence
        multiplies by gates one after the other, no powers are formed: gates of exactly 0 and 1
        are exact. Measured against float64: 2e-7.

    Cost:
        O(T D) for the recurrence and O(T S D / L) for the attention; O((T + S) D) memory, the
        backward included, which computes the weights again. A state has
        2 (T / L + 1) numbers per channel, softmax attention's 2 T.

    Source:
        Wei, Yadav, Pascanu and Gulcehre, "RAT: Bridging RNN Efficiency and Attention Accuracy
        via Chunk-based Sequence Modeling", 2025, arXiv 2507.04416. The authors' layer and models
        are matched to 1e-5, outputs and gradients. Their decoding fails in the first chunk and
        needs padding on the right; here it starts at any token. They round averages to
        bfloat16; here that depends on the inputs.

    Limits:
        Values have the size of keys, whose gate they share. No form that looks ahead and no
        cross-attention: the paper has none. A state keeps no past within a chunk, so it cannot
        be cropped. Differentiable once (impl="reference": any number of times).

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device, or a state of
            another kind; the message names the argument.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 40, 8)
    >>> gate = torch.rand(1, 2, 40, 8)
    >>> out = rat_attention(q, k, v, gate, chunk_length=8)
    >>> first, state = rat_attention(
    ...     *(x[:, :, :21] for x in (q, k, v, gate)), chunk_length=8, return_state=True
    ... )
    >>> last = rat_attention(*(x[:, :, 21:] for x in (q, k, v, gate)), chunk_length=8, state=state)
    >>> torch.allclose(torch.cat([first, last], 2), out, atol=1e-6), state["ends_k"].shape
    (True, torch.Size([1, 2, 2, 8]))
    """
    q, k, v = cast_for_autocast(q, k, v)
    call = Call(q, k, v, gate, chunk_length, scale, rope, key_mask, state, return_state)
    call, sizes = check(call, causal, cu_seqlens)
    form = choose(OP, FORMS, impl, call)
    if cu_seqlens is None:
        return form.run(call)

    def one(q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Tensor:
        return form.run(call.one(q, k, v, operands["gate"], operands["key_mask"]))

    sequences = spans(OP, cu_seqlens, None, sizes)
    return run_packed(one, sequences, q, k, v, {}, {"gate": (gate, 2), "key_mask": (key_mask, 1)})
