"""Linear attention over ranks: what a rank leaves of the past is a product of decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard import ops
from regard.core.state import FixedState
from regard.ops.linear.decays import split_steps
from regard.parallel.collectives import Group
from regard.parallel.sequence import Encoded, Operands, Rule, attend


def linear_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hk t dv"],
    *,
    group: Group = None,
    causal: bool = False,
    feature_map: str = "elu",
    normalise: bool = True,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b t"] | None = None,
    log_decay: Float[Tensor, "b hk t"] | Float[Tensor, "b hk t d"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """`regard.ops.linear_attention` of one sequence whose tokens lie on many ranks.

        S_t = exp(a_t) S_{t-1} + phi(k_t) v_t^T,   o_t = phi(q_t)^T S_t / phi(q_t)^T z_t

    over all tokens of all ranks, in the order of the ranks. Rank p turns the state that reaches
    it into W_p S + N_p, N_p its own tokens from nothing and W_p = exp(sum of its a_t); one
    all_gather of these pairs tells every rank the state that it begins with, and the op runs on
    the rank's own tokens with that state.

    Shapes: q [B, H, n, D], k [B, Hk, n, D], v [B, Hk, n, Dv] -> [B, H, n, Dv], where n is the
    number of tokens *here*, which may differ between ranks and may be 0. All other operands of
    keys are this rank's part, too. `regard.parallel.share` cuts a whole tensor.

    Args:
        group: a `torch.distributed` group; None is all ranks. A group of one rank is a plain
            call of the op.
        causal: query t of this rank reads the state after its own key, and q must have as many
            tokens as k. Without, every query of every rank reads the state after the last
            token of the last rank, and q may have any number of them.
        cu_seqlens: int32 boundaries of packed sequences in the *whole* pack, the same on every
            rank, with B = 1 and the tokens divided as `regard.parallel.span` does it; a
            sequence may reach over any number of ranks. Needs `causal`; read on the host.
        state: what precedes the first token of rank 0, and taken from there: the other ranks
            may give it or not.
        return_state: also the state after the last token of the last rank, on every rank.
        feature_map, normalise, scale, key_mask, log_decay, chunk_size, impl: as in the op. The
            state of a rank's tokens is formed by whatever `impl="auto"` takes.

    Gradients are exact. The loss is the sum of what all ranks compute: gradients of what is
    this rank's (q, k, v, log_decay) are complete, those of what every rank holds (a learned
    scale) are this rank's part, to be added up over ranks as data parallelism does. That of
    `state` is on rank 0. Every rank has to call backward, and q, k, v, log_decay require a
    gradient on all ranks or on none.

    Precision: as the op; the states are exchanged and folded in float32 (float64 for float64
    inputs), so results differ from those of one process by rounding.
    Cost: O(n D Dv) time a rank, of which forming N_p is a third or less, plus O(ranks D Dv).
    Each rank receives (ranks - 1) B Hk (D Dv + D + 1) numbers in the forward pass and
    (ranks - 1) B Hk (D Dv + D) in the backward pass (without `normalise` no + D; Dv + 1 for
    Dv with it), once more as many backwards for a state that is returned, however long the
    sequence is.
    Source: the scan of states is that of Sun et al. 2024, "Linear Attention Sequence
    Parallelism", arXiv 2404.02882, gathered as in LASP-2 (arXiv 2502.07563), with decays,
    normaliser and packs. Equal to one process to 1e-10 in float64, gradients to 1e-9.
    Limits: differentiable once; not traced by torch.compile. A mistake on one rank alone leaves
    the others waiting, as in any collective.
    Raises: ValueError, TypeError for arguments that do not fit; RuntimeError without
    `torch.distributed`.

    With `torchrun --nproc-per-node 2`:

        rank, ranks = dist.get_rank(), dist.get_world_size()
        q, k, v = (share(x, rank, ranks) for x in (q, k, v))
        out = regard.parallel.linear_attention(q, k, v, causal=True)
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, operands: Operands, causal: bool,
        state: FixedState | None, return_state: bool, cu_seqlens: Tensor | None,
        impl: str = impl,
    ) -> Any:  # fmt: skip
        return ops.linear_attention(
            q, k, v, causal=causal, feature_map=feature_map, normalise=normalise, scale=scale,
            chunk_size=chunk_size, state=state, return_state=return_state,
            cu_seqlens=cu_seqlens, impl=impl, **operands,
        )  # fmt: skip

    rule = Rule("parallel.linear_attention", run, _encoder(q, run))
    return attend(
        rule, q, k, v, {"key_mask": key_mask, "log_decay": log_decay}, group=group,
        causal=causal, cu_seqlens=cu_seqlens, state=state, return_state=return_state,
    )  # fmt: skip


def lightning_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hk t dv"],
    *,
    group: Group = None,
    causal: bool = False,
    log_decay: Float[Tensor, "b hk t"] | Float[Tensor, "b h t"] | None = None,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b t"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    state: FixedState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Any:
    """`regard.ops.lightning_attention` of one sequence whose tokens lie on many ranks.

        S_t = exp(a_t) S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t

    over all tokens of all ranks, in the order of the ranks: `regard.parallel.linear_attention`
    without features and normaliser. A decay that is one constant per head is made for this
    rank's keys, `constant_log_decay(-alibi_slopes(H), k)`.

    Shapes, arguments, gradients, precision, limits: as `regard.parallel.linear_attention`.

    Cost: O(n D Dv) time a rank, of which forming N_p is a third or less, plus O(ranks D Dv).
    Each rank receives (ranks - 1) B Hk (D Dv + 1) numbers in the forward pass and (ranks - 1)
    B Hk D Dv in the backward pass, however long the sequence is.
    Source: the op is that of Qin et al. 2024, arXiv 2405.17381; the scan as in
    `regard.parallel.linear_attention`.
    Raises: ValueError, TypeError for arguments that do not fit; RuntimeError without
    `torch.distributed`.
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, operands: Operands, causal: bool,
        state: FixedState | None, return_state: bool, cu_seqlens: Tensor | None,
        impl: str = impl,
    ) -> Any:  # fmt: skip
        return ops.lightning_attention(
            q, k, v, causal=causal, scale=scale, chunk_size=chunk_size, state=state,
            return_state=return_state, cu_seqlens=cu_seqlens, impl=impl, **operands,
        )  # fmt: skip

    rule = Rule("parallel.lightning_attention", run, _encoder(q, run))
    return attend(
        rule, q, k, v, {"key_mask": key_mask, "log_decay": log_decay}, group=group,
        causal=causal, cu_seqlens=cu_seqlens, state=state, return_state=return_state,
    )  # fmt: skip


def _encoder(q: Tensor, run: Callable[..., Any]) -> Callable[..., Encoded]:
    """The op without queries, and the decay over its keys."""

    def encode(k: Tensor, v: Tensor, operands: Operands, state: FixedState | None) -> Encoded:
        _, after = run(q[:, :, :0], k, v, operands, True, state, True, None, impl="auto")
        like = after["S"]
        return Encoded(after, left_of_decay(operands["log_decay"], operands["key_mask"], like))

    return encode


def left_of_decay(log_decay: Tensor | None, key_mask: Tensor | None, like: Tensor) -> Tensor:
    """What tokens leave of a state `like` [B, Hk, F, E]: [B, Hk, 1 | F, 1].

    Sums in float64; minus infinity, and any step whose exponential is 0, leaves exactly nothing.
    """
    if log_decay is None:
        return like.new_ones(*like.shape[:2], 1, 1)
    if key_mask is not None:
        masked = ~key_mask[:, None]
        log_decay = log_decay.masked_fill(masked[..., None] if log_decay.dim() == 4 else masked, 0)
    steps, forgets = split_steps(log_decay)
    left = steps.sum(2).to(like.dtype).exp().masked_fill(forgets.any(2), 0.0)
    left = left.unsqueeze(-1) if log_decay.dim() == 4 else left[..., None, None]
    return left.expand(-1, like.shape[1], -1, -1)
