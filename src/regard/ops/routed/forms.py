"""The forms of attention to routed regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core.dispatch import Form
from regard.core.precision import compute_dtype
from regard.ops.routed.reference import routed_reference
from regard.ops.routed.registered import routed


@dataclass(frozen=True)
class Call:
    """One checked call on regions: [B, H, R, m, D]; hidden [B, Rk, w] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    route: Tensor
    scale: float | Tensor | None
    hidden: Tensor | None


def _eager(call: Call) -> Tensor:
    dtype = compute_dtype(call.q.dtype)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    scale = q.shape[4] ** -0.5 if call.scale is None else call.scale
    q = q * (scale.to(dtype).reshape(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale)
    if call.hidden is not None:
        k, v = (torch.where(call.hidden[:, None, :, :, None], 0.0, x) for x in (k, v))
    route = call.route.expand(q.shape[0], -1, -1, -1)
    if 1 < route.shape[1] < q.shape[1]:  # per key head
        route = route.repeat_interleave(q.shape[1] // route.shape[1], 1)
    return routed(q, k, v, route, call.hidden)[0]


def _reference(call: Call) -> Tensor:
    route = call.route
    if 1 < route.shape[1] < call.q.shape[1]:
        route = route.repeat_interleave(call.q.shape[1] // route.shape[1], 1)
    return routed_reference(call.q, call.k, call.v, route, call.hidden, call.scale)


FORMS = (
    Form("eager", "regions", lambda call: None, _eager),
    Form("reference", "reference", lambda call: None, _reference, auto=False),
)
