"""The weights of Hedgehog as a matrix: what is distilled, and what is looked at."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from regard.core.checks import check_flag, check_key_mask, check_number, check_qkv
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.core.visibility import Visibility
from regard.ops.linear.learned_features import CLAMP, check_maps, learned, to_heads

_OP = "hedgehog_weights"


def hedgehog_weights(
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
    epsilon: float | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b h t s"]:
    """The weights by which `hedgehog_attention` sums the values: [B, H, T, S].

        p_ij = phi_q(q_i) . phi_k(k_j) / (sum_j phi_q(q_i) . phi_k(k_j) + epsilon)

    exactly 0 where a query does not see a key.

    Shapes: q [B, H, T, D], k [B, Hk, S, D] -> [B, H, T, S]. Arguments as of
    `hedgehog_attention`.

    Precision: float32 at least; the result is not rounded to 16 bits.
    Cost: O(T S F) time, O(B H T S) memory: for one layer at a time.
    Source: Zhang et al. 2024, arXiv 2402.04347; the authors' weights are matched to 1e-5.
    Limits: differentiable once (the activations have one derivative).
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> import torch
    >>> p = hedgehog_weights(*torch.randn(2, 1, 2, 5, 4), causal=True)
    >>> torch.allclose(p.sum(-1), torch.ones(1, 2, 5))
    True
    """
    q, k = cast_for_autocast(q, k)
    sizes = check_qkv(_OP, q, k, k)
    check_flag(_OP, "causal", causal)
    check_key_mask(_OP, key_mask, sizes, q)
    maps, biases = (map_q, map_k), (bias_q, bias_k)
    heads = check_maps(_OP, sizes, q, maps, biases, activation, full_space, skip)
    if epsilon is None:
        epsilon = 0.0 if activation == "exp" else CLAMP
    check_number(_OP, "epsilon", epsilon, least=0.0)
    with without_autocast(q):
        if key_mask is not None:
            k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
        x, y = q.to(compute_dtype(q.dtype)), to_heads(k, heads).to(compute_dtype(q.dtype))
        x = learned(map_q, bias_q, activation, full_space, skip, of_queries=True).apply(x)
        y = learned(map_k, bias_k, activation, full_space, skip, of_queries=False).apply(y)
        B, H, T, F = x.shape
        weights = (x.reshape(B, heads, H // heads * T, F) @ y.mT).view(B, H, T, -1)
        sees = Visibility(T, sizes.S, causal, key_mask=key_mask, heads=H, device=q.device)
        mask = sees.tile((0, T), (0, sizes.S), weights.dtype).mask
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        total = weights.sum(-1, keepdim=True) + epsilon
        return weights / total.masked_fill(total == 0, 1.0)
