"""The weights of Hedgehog with a softmax window as a matrix."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.ops.hedgehog_window.call import Call, check
from regard.ops.linear.learned_features import learned, to_heads

_OP = "hedgehog_window_weights"


def hedgehog_window_weights(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    *,
    map_q: Float[Tensor, "#h d f"] | None = None,
    map_k: Float[Tensor, "#hk d f"] | None = None,
    bias_q: Float[Tensor, " #h *f"] | None = None,
    bias_k: Float[Tensor, " #hk *f"] | None = None,
    activation: str = "softmax_dim",
    full_space: bool = True,
    skip: bool = False,
    window_length: int = 64,
    layout: str = "sliding",
    align: str = "start",
    gamma: float | Float[Tensor, ""] | Float[Tensor, " h"] = 0.1,
    affine: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    causal: bool = True,
    key_mask: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b h t s"]:
    """The weights by which `hedgehog_window_attention` sums the values: [B, H, T, S].

        p_ij = w_ij / sum_j w_ij,   w_ij = gamma exp(s_ij - m_i) or beta phi_q(q_i) . phi_k(k_j)

    Exactly 0 where a query does not see a key; other rows sum to 1.

    Shapes: q [B, H, T, D], k [B, Hk, S, D] -> [B, H, T, S]. Arguments as of that op.

    Precision: float32 at least; the result is not rounded to 16 bits.
    Cost: O(T S (D + F)) time, O(B H T S) memory: for one layer at a time.
    Source: Zhang et al. 2024, arXiv 2410.10254; the authors' weights are matched to 1e-5.
    Limits: differentiable once (the activations have one derivative).
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> p = hedgehog_window_weights(*torch.randn(2, 1, 2, 5, 4), window_length=2)
    >>> torch.allclose(p.sum(-1), torch.ones(1, 2, 5))
    True
    """
    q, k = cast_for_autocast(q, k)
    call = Call(
        q, k, k, map_q, map_k, bias_q, bias_k, activation, full_space, skip, window_length, layout,
        align, gamma, affine, scale, causal, key_mask, None, False,
    )  # fmt: skip
    check(call, _OP)
    with without_autocast(q):
        return _weights(call)


def _weights(call: Call) -> Tensor:
    dtype, (B, H, T, D), S = compute_dtype(call.q.dtype), call.q.shape, call.k.shape[2]
    q, k, w = call.q.to(dtype), call.k.to(dtype), call.window_length
    place = torch.arange(T, device=q.device) + S - T
    seen = (torch.arange(S, device=q.device) <= place[:, None])[None]
    number, at = torch.arange(S, device=q.device)[None], place[None]
    if call.key_mask is not None:  # a masked token takes no place
        k = k.masked_fill(~call.key_mask[:, None, :, None], 0.0)
        seen = seen & call.key_mask[:, None]
        number = call.key_mask.cumsum(1) - 1
        at = pad(number, (1, 0), value=-1).index_select(1, place.clamp(min=-1) + 1)
    reach = torch.full_like(at, w)
    if call.layout == "terraced":
        blocks = at + (-S) % w if call.align == "end" else at
        reach = w + 1 + blocks % w
    near = number[:, None, :] > (at - reach)[..., None]
    window, behind = (seen & near)[:, None], (seen & ~near)[:, None]

    def per_head(x: float | Tensor) -> float | Tensor:
        return x.to(dtype).reshape(-1, 1, 1) if isinstance(x, Tensor) else x

    scale, gamma = per_head(D**-0.5 if call.scale is None else call.scale), per_head(call.gamma)
    scores = (q @ to_heads(k, H).mT * scale).masked_fill(~window, -torch.inf)
    most = scores.amax(-1, keepdim=True) if S else scores.new_zeros(B, H, T, 1)
    softmax = (scores - most.masked_fill(most == -torch.inf, 0.0)).exp()
    options = call.activation, call.full_space, call.skip
    queries = learned(call.map_q, call.bias_q, *options, of_queries=True).apply(q)
    keys = learned(call.map_k, call.bias_k, *options, of_queries=False).apply(
        to_heads(k, call.key_heads)
    )
    far = (queries @ to_heads(keys, H).mT).masked_fill(~behind, 0.0)
    weights = gamma * softmax + (1 - gamma if call.affine else 1.0) * far
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)
