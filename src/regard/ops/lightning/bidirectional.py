"""Lightning attention to both sides: weights that decay with the distance from the query."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.checks import reject
from regard.core.packed import run_packed, spans
from regard.core.precision import cast_for_autocast, compute_dtype
from regard.ops.lightning.forms import BIDIRECTIONAL as OP
from regard.ops.lightning.forms import HALF, bidirectional_reference
from regard.ops.lightning.heads import heads_of_decay
from regard.ops.linear.attend import attend, check
from regard.ops.linear.problem import Problem


def bidirectional_lightning_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk t d"],
    v: Float[Tensor, "b hk t dv"],
    *,
    log_decay: Float[Tensor, "b hk t"] | None = None,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b t"] | None = None,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Lightning attention to both sides: the weight of a key decays with its distance.

        o_t = scale sum_j w_tj (q_t . k_j) v_j,
        w_tj = exp(a_{j+1} + ... + a_t) for j <= t,    exp(a_{t+1} + ... + a_j) for j > t

    with a = `log_decay`: under a constant decay, lambda^|t - j|. An extension: the paper's
    attention is causal. It is two causal walks, one from either end; the second leaves out a
    token's own key, so that nothing is counted twice or taken off again.

    Shapes: q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, Dv] -> [B, H, T, Dv]; H a multiple of
    Hk. A query with no key at all gives 0.

    Args: as of `lightning_attention`; log_decay is [B, 1 | Hk | H, T].

    Precision: sums in float32 (float64 for float64 inputs), as of `lightning_attention`.
    Cost: O(T D Dv + T C (D + Dv)) time in chunks of C, twice that of a causal call;
    O(T (D + Dv)) memory.
    Source: an extension of Qin et al. 2024, arXiv 2405.17381. Equal to the matrix of weights to
    1e-10 in float64.
    Limits: differentiable once. No state: a query reads what comes after it.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> one = torch.ones(1, 1, 3, 1)
    >>> half = torch.full((1, 1, 3), 0.5).log()
    >>> bidirectional_lightning_attention(one, one, one, log_decay=half).flatten()
    tensor([1.7500, 2.0000, 1.7500])
    """
    q, k, v = cast_for_autocast(q, k, v)
    k, v = heads_of_decay(q, k, v, log_decay)
    problem = Problem(
        q, k, v, True, scale=scale, key_mask=key_mask, log_decay=log_decay, chunk=chunk_size,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    sizes = check(HALF, problem, None)
    if sizes.T != sizes.S:
        raise reject(OP, "k", f"of q's length {sizes.T}", k)

    def one(q: Tensor, k: Tensor, v: Tensor, **operands: Tensor | None) -> Tensor:
        piece = problem._replace(q=q, k=k, v=v, cu_seqlens=None, **operands)
        return _both(piece, impl)

    if cu_seqlens is None:
        return _both(problem, impl)
    operands: dict[str, tuple[Tensor | None, int]]
    operands = {"key_mask": (key_mask, 1), "log_decay": (log_decay, 2)}
    return run_packed(one, spans(OP, cu_seqlens, None, sizes), q, k, v, {}, operands)


def _both(problem: Problem, impl: str) -> Tensor:
    if impl == "reference":
        return bidirectional_reference(problem)
    dtype, back = problem.q.dtype, _backwards(problem)
    wide = problem._replace(**{x: getattr(problem, x).to(back.q.dtype) for x in ("q", "k", "v")})
    before = attend(HALF, wide, impl=impl)
    return (before + attend(HALF, back, impl=impl).flip(2)).to(dtype)


def _backwards(problem: Problem) -> Problem:
    """What each query reads of the keys after it, as a causal problem from the other end.

    Seen from there, query t stands at key t + 1, the last one before its own: a causal call with
    a key less. A step decays what crosses it, so on the way back that of key j has already
    decayed key j itself, and then everything that comes from beyond it.
    """
    dtype = compute_dtype(problem.q.dtype)
    k, v, steps, mask = (
        problem.k.to(dtype),
        problem.v.to(dtype),
        problem.log_decay,
        problem.key_mask,
    )
    if mask is not None:
        masked = ~mask[:, None]
        k = k.masked_fill(masked[..., None], 0.0)
        steps = None if steps is None else steps.masked_fill(masked, 0.0)
    if steps is not None:
        k = k * steps.to(dtype).exp()[..., None]
        steps = steps.flip(2)[:, :, :-1]
    return problem._replace(
        q=problem.q.to(dtype).flip(2), k=k.flip(2)[:, :, :-1], v=v.flip(2)[:, :, :-1],
        log_decay=steps, key_mask=None if mask is None else mask.flip(1)[:, :-1],
    )  # fmt: skip
