"""Local linear regression on weighted points, through the op: predictions, slopes, leave-one-out.

With scale = 1 / bandwidth^2 and key_bias = -scale |k|^2 / 2 + log weight, the score
scale q . k + key_bias is, up to a constant of the query, the logarithm of
weight exp(-|q - k|^2 / (2 bandwidth^2)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.ops.local_linear import local_linear_attention, local_linear_slope


@dataclass(frozen=True)
class Points:
    """What a fit is made from: n places, their values and how much each counts."""

    keys: Float[Tensor, "n d"]
    values: Float[Tensor, "n p"]
    log_weights: Float[Tensor, " n"]

    def select(self, rows: Tensor) -> Points:
        """These points, in this order."""
        return Points(self.keys[rows], self.values[rows], self.log_weights[rows])


def _kernel(points: Points, bandwidth: float, ridge: float) -> dict[str, Any]:
    scale = bandwidth**-2
    bias = points.log_weights - 0.5 * scale * points.keys.square().sum(-1)
    return {"scale": scale, "ridge": ridge, "key_bias": bias[None, None]}


def _attend(points: Points, queries: Tensor, bandwidth: float, ridge: float, **more: Any) -> Tensor:
    q, k, v = (x[None, None] for x in (queries, points.keys, points.values))
    return local_linear_attention(q, k, v, **_kernel(points, bandwidth, ridge), **more)[0, 0]


@torch.no_grad()
def predict(
    points: Points, queries: Float[Tensor, "t d"], bandwidth: float, ridge: float
) -> Float[Tensor, "t p"]:
    """The local linear fits at the queries."""
    return _attend(points, queries, bandwidth, ridge)


@torch.enable_grad()
def predict_with_gradient(
    points: Points, queries: Float[Tensor, "t d"], bandwidth: float, ridge: float
) -> tuple[Float[Tensor, "t p"], Float[Tensor, "t p d"]]:
    """Predictions and d prediction / d query; one backward pass for each output."""
    queries = queries.detach().requires_grad_()
    out = _attend(points, queries, bandwidth, ridge)
    # A prediction depends on its own query only: the gradient of the sum holds them all.
    gradients = [
        torch.autograd.grad(column.sum(), queries, retain_graph=True)[0] for column in out.unbind(1)
    ]
    return out.detach(), torch.stack(gradients, 1)


@torch.no_grad()
def fitted_slope(
    points: Points, queries: Float[Tensor, "t d"], bandwidth: float, ridge: float
) -> Float[Tensor, "t p d"]:
    """The slope of the plane that is fitted around each query."""
    q, k, v = (x[None, None] for x in (queries, points.keys, points.values))
    return local_linear_slope(q, k, v, **_kernel(points, bandwidth, ridge))[0, 0]


@torch.no_grad()
def leave_one_out(
    points: Points, count: int, bandwidth: float, ridge: float, tol: float | None = None
) -> Float[Tensor, "count p"]:
    """Predictions at the first `count` points, each from all points but itself.

    Exact, and as cheap as predicting: the points are laid out once and a bit more,
    k_0 .. k_{n-1}, k_0 .. k_{count-2}, and query i stands at place i + n - 1. A window of n - 2
    places to its left ends right after its own first copy, so that it sees i + 1 .. n - 1 and
    0 .. i - 1. (The other way, deleting row i from its own fit by
    (o_i - h_ii v_i) / (1 - h_ii) with the ridge lambda (1 - p_ii), subtracts nearly equal
    numbers wherever a point is alone within its bandwidth.)
    """
    n = len(points.keys)
    if n < 2:
        raise ValueError("leave_one_out: there must be at least two points")
    circle = torch.arange(n + count - 1, device=points.keys.device) % n
    queries = points.keys[:count]
    return _attend(points.select(circle), queries, bandwidth, ridge, window=(n - 2, 0), tol=tol)
