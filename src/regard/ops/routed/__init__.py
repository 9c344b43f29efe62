"""Bi-level routing: regions attend to the tokens of the few regions that fit them best.

- `registered.py`: attention of regions to named regions, as torch operators
- `maps.py`: the regions of a map
- `reference.py`: the equations; `forms.py`: which form serves a call; `card.py`
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard.core.checks import (
    Sizes,
    check_flag,
    check_integer,
    check_key_mask,
    check_qkv,
    check_scale,
    check_shape,
    reject,
)
from regard.core.dispatch import choose
from regard.core.precision import cast_for_autocast, compute_dtype, without_autocast
from regard.ops.routed.forms import FORMS, Call

__all__ = ["region_route", "region_topk_attention", "routed_attention"]

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def region_route(
    q: Float[Tensor, "b h r m d"],
    k: Float[Tensor, "b hk s w d"],
    topk: int,
    *,
    per_head: bool = False,
    q_mask: Bool[Tensor, "#b r m"] | None = None,
    k_mask: Bool[Tensor, "#b s w"] | None = None,
) -> Int[Tensor, "b n r topk"]:
    """For every region of queries, the regions of keys whose means fit its mean best.

        route_r = topk_s  sum_h mean(q_hr) . mean(k_hs)

    Shapes: [B, H, T, D] with the T tokens in regions: q [B, H, R, m, D], k [B, Hk, S, w, D] ->
    int64 [B, 1, R, topk], or with `per_head`, where there is no sum over heads, [B, H, R, topk].
    No gradient flows through a route.

    Args:
        topk: at most S.
        q_mask, k_mask: [B or 1, R, m], [B or 1, S, w], True = real token. Means are those of real
            tokens; a region without one is chosen last and stands as -1.

    Precision: means and scores in float32 (float64 for float64 inputs).
    Cost: O(T D + R S D) time, O(R S) memory.
    Source: BiFormer (arXiv 2303.08810, 2023); its routes are matched.
    Limits: not differentiable.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> q, k = torch.randn(2, 1, 4, 9, 16, 8)
    >>> region_route(q, k, 2).shape
    torch.Size([1, 1, 9, 2])
    """
    op = "region_route"
    for name, value in (("q", q), ("k", k)):
        if not isinstance(value, Tensor) or value.dim() != 5:
            raise reject(op, name, "a tensor [batch, heads, regions, tokens, channels]", value)
    if k.shape[0] != q.shape[0] or k.shape[4] != q.shape[4] or q.shape[1] % max(k.shape[1], 1):
        raise reject(op, "k", f"[{q.shape[0]}, heads, regions, tokens, {q.shape[4]}] like q", k)
    check_integer(op, "topk", topk)
    check_flag(op, "per_head", per_head)
    if topk > k.shape[2]:
        raise reject(op, "topk", f"at most the {k.shape[2]} regions of keys", topk)
    for name, mask, x in (("q_mask", q_mask, q), ("k_mask", k_mask, k)):
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise reject(op, name, "a bool tensor (True = real)", mask, kind=TypeError)
            check_shape(op, name, mask, ((1, x.shape[0]), *x.shape[2:4]), q)
    with torch.no_grad(), without_autocast(q):
        mean_q, _ = _means(q, q_mask)
        mean_k, some = _means(k, k_mask)
        group = q.shape[1] // k.shape[1]
        if per_head:
            scores = mean_q @ mean_k.repeat_interleave(group, 1).mT
        else:
            joint = mean_q.unflatten(1, (-1, group)).sum(2)
            scores = torch.einsum("bhrd,bhsd->brs", joint, mean_k)[:, None]
        if some is None:
            return scores.topk(topk, 3).indices
        best = torch.where(some[:, None, None], scores, -torch.inf).topk(topk, 3)
        return torch.where(best.values == -torch.inf, -1, best.indices)


def routed_attention(
    q: Float[Tensor, "b h *r d"],
    k: Float[Tensor, "b hk *s d"],
    v: Float[Tensor, "b hk *s dv"],
    route: Int[Tensor, "#b #h r n"],
    *,
    q_regions: int | None = None,
    kv_regions: int | None = None,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b *r w"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h *r dv"]:
    """Every region of queries attends to all tokens of the regions that a route names.

        o_i = sum_j softmax_j(scale q_i . k_j) v_j,   j in the regions route[region of i]

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv] with tokens region
    after region; or regions on an axis of their own, q [B, H, R, m, D], k [B, Hk, Rk, w, D],
    v [B, Hk, Rk, w, Dv] -> [B, H, R, m, Dv]. Keys may belong to another map than queries, in
    other regions.

    Args:
        route: integers [B or 1, 1 or Hk or H, R, n]; -1 names none, and a region named twice
            counts once. No gradient.
        q_regions, kv_regions: R and Rk, which divide T and S. None: those of the axis; without
            one, the R of `route`, and as many as make regions of keys as large as those of queries.
        scale: None is D ** -0.5; a number, a tensor [] or one per head [H].
        key_mask: bool [B, S] or [B, Rk, w], True = real key. A query that sees none gives 0.
        impl: "auto", "eager" or "reference" (dense scores, differentiable twice).

    Precision: scores, weights and sums in float32 (float64 for float64 inputs).
    Cost: O(T n w (D + Dv)) time. Memory: O((T + S)(D + Dv)) and 4 MB, no gathered copy of keys.
    Source: BiFormer (arXiv 2303.08810, 2023), whose operator is matched to 1e-5.
    Limits: differentiable once. Gradients of keys are summed in no fixed order on a GPU.
    Raises: ValueError, TypeError for arguments that do not fit; ValueError for an index outside
    of the regions.

    >>> q, k, v = torch.randn(3, 1, 4, 9, 16, 8)
    >>> routed_attention(q, k, v, region_route(q, k, 2)).shape
    torch.Size([1, 4, 9, 16, 8])
    """
    op = "routed_attention"
    q, k, v = cast_for_autocast(q, k, v)
    shape = q.shape if isinstance(q, Tensor) else ()
    if len(shape) == 5:
        flat = [x.flatten(2, 3) if isinstance(x, Tensor) and x.dim() == 5 else x for x in (k, v)]
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor) or x.dim() != 5:
                raise reject(op, name, "[batch, heads, regions, tokens, channels] like q", x)
        sizes = check_qkv(op, q.flatten(2, 3), *flat)
        check_shape(op, "v", v, (*k.shape[:4], v.shape[4]), q)
        regions, behind = _number(op, "q_regions", q_regions, shape[2], True), k.shape[2]
        behind = _number(op, "kv_regions", kv_regions, behind, True)
    else:
        sizes = check_qkv(op, q, k, v)
        given = route.shape[2] if isinstance(route, Tensor) and route.dim() == 4 else 1
        regions = _number(op, "q_regions", q_regions, given, False)
        size = sizes.T // regions if regions else 1
        behind = _number(op, "kv_regions", kv_regions, sizes.S // max(size, 1), False)
        for name, count, tokens in (
            ("q_regions", regions, sizes.T),
            ("kv_regions", behind, sizes.S),
        ):
            if count * (tokens // max(count, 1)) != tokens:
                raise reject(op, name, f"a divisor of {tokens} tokens", count)
        q = q.unflatten(2, (regions, sizes.T // max(regions, 1)))
        k, v = (x.unflatten(2, (behind, sizes.S // max(behind, 1))) for x in (k, v))
    check_scale(op, scale, sizes, q)
    _check_route(op, route, sizes, regions, q)
    hidden = None
    if key_mask is not None:
        if isinstance(key_mask, Tensor) and key_mask.dim() == 3:
            check_shape(op, "key_mask", key_mask, (sizes.B, behind, k.shape[3]), q)
            key_mask = key_mask.flatten(1)
        check_key_mask(op, key_mask, sizes, q)
        hidden = ~key_mask.view(sizes.B, behind, k.shape[3])
    call = Call(q, k, v, route, scale, hidden)
    form = choose(op, FORMS, impl, call)
    with without_autocast(q):
        out = form.run(call).to(q.dtype)
    return out if len(shape) == 5 else out.flatten(2, 3)


def region_topk_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b hk s d"],
    v: Float[Tensor, "b hk s dv"],
    *,
    region: int = 64,
    topk: int = 4,
    causal: bool = False,
    per_head: bool = False,
    scale: float | Float[Tensor, ""] | Float[Tensor, " h"] | None = None,
    key_mask: Bool[Tensor, "b s"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t dv"]:
    """Bi-level routing: regions attend to the `topk` regions that fit them best by their means.

        o_i = sum_j softmax_j(scale q_i . k_j) v_j,   j in region_route(q, k, topk)[i // region]

    A region is `region` tokens that follow each other; the last one may be shorter. Tokens of a
    map stand region after region (`regard.ops.routed.maps`).

    Shapes: q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv].

    Args:
        topk: regions of keys; where there are fewer, all are seen.
        causal: must be False: a region chooses by all of its queries.
        per_head: every query head chooses for itself, else all together.
        scale, key_mask, impl: of `routed_attention`; a masked key is in no mean.

    Precision: float32 (float64 for float64 inputs).
    Cost: O(T topk region (D + Dv) + T S D / region^2) time, O((T + S)(D + Dv)) memory.
    Source: BiFormer (arXiv 2303.08810, 2023).
    Limits: differentiable once, and not through the choice. No causal form.
    Raises: ValueError, TypeError for arguments that do not fit.

    >>> q, k, v = torch.randn(3, 1, 2, 50, 16)
    >>> region_topk_attention(q, k, v, region=8, topk=2).shape
    torch.Size([1, 2, 50, 16])
    """
    op = "region_topk_attention"
    q, k, v = cast_for_autocast(q, k, v)
    sizes = check_qkv(op, q, k, v)
    check_scale(op, scale, sizes, q)
    check_key_mask(op, key_mask, sizes, q)
    check_integer(op, "region", region)
    check_integer(op, "topk", topk)
    check_flag(op, "causal", causal)
    if causal:
        raise reject(op, "causal", "False: a region chooses by all of its queries", causal)
    check_flag(op, "per_head", per_head)
    if not (sizes.T and sizes.S):
        out = q.to(compute_dtype(q.dtype)).sum(3, keepdim=True) * 0.0
        return out.expand(-1, -1, -1, sizes.Dv).to(q.dtype)
    R, Rk = -(-sizes.T // region), -(-sizes.S // region)
    behind = R * region - sizes.T, Rk * region - sizes.S
    q = pad(q, (0, 0, 0, behind[0])).unflatten(2, (R, region))
    k, v = (pad(x, (0, 0, 0, behind[1])).unflatten(2, (Rk, region)) for x in (k, v))
    q_mask = k_mask = None
    if behind[0]:
        place = torch.arange(R * region, device=q.device)
        q_mask = (place < sizes.T).view(1, R, region)
    if behind[1] or key_mask is not None:
        real = key_mask
        if real is None:
            real = torch.ones(sizes.B, sizes.S, dtype=torch.bool, device=q.device)
        k_mask = pad(real, (0, behind[1])).view(sizes.B, Rk, region)
    with torch.no_grad():
        route = region_route(
            q, k, min(topk, Rk), per_head=per_head, q_mask=q_mask, k_mask=k_mask
        )  # fmt: skip
    call = Call(q, k, v, route, scale, None if k_mask is None else ~k_mask)
    form = choose(op, FORMS, impl, call)
    with without_autocast(q):
        out = form.run(call).to(q.dtype)
    return out.flatten(2, 3)[:, :, : sizes.T]


def _means(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Means of regions [B, H, R, D], and which regions have any token [B, R]."""
    x = x.to(compute_dtype(x.dtype))
    if mask is None:
        return x.mean(3), None
    count = mask.sum(2)
    total = torch.where(mask[:, None, :, :, None], x, 0.0).sum(3)
    return total / count.clamp(min=1)[:, None, :, None], count > 0


def _number(op: str, name: str, value: Any, default: int, fixed: bool) -> int:
    if value is None:
        return default
    check_integer(op, name, value)
    if fixed and value != default:
        raise reject(op, name, f"None or the {default} regions on their axis", value)
    return value


def _check_route(op: str, route: Any, sizes: Sizes, regions: int, like: Tensor) -> None:
    if not isinstance(route, Tensor) or route.dtype not in _INTEGERS:
        raise reject(op, "route", "a tensor of integers", route, kind=TypeError)
    width = route.shape[-1] if route.dim() else 1
    shape = ((1, sizes.B), (1, sizes.Hk, sizes.H), regions, width)
    check_shape(op, "route", route, shape, like)
