"""Leave-one-out, gradients and slopes against fits that are made anew, one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.core.budgets import budget, relative_error
from regard.sklearn.points import (
    Points,
    fitted_slope,
    leave_one_out,
    predict,
    predict_with_gradient,
)

BUDGET = budget(torch.float64)


def sample(n: int, features: int = 3, outputs: int = 2, seed: int = 0) -> Points:
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, features, generator=draw, dtype=torch.float64)
    values = torch.sin(2 * keys[:, :1]) + torch.randn(
        n, outputs, generator=draw, dtype=torch.float64
    )
    return Points(keys, values, torch.rand(n, generator=draw, dtype=torch.float64).log())


def least_squares(
    points: Points, query: Tensor, bandwidth: float, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Intercept, slope and normalised weights of argmin sum p |v - b - W (k - q)|^2 + ridge |W|^2.

    By an augmented least-squares problem in the design (1, k - q), not by the op's formula.
    """
    away = points.keys - query
    p = torch.softmax(points.log_weights - away.square().sum(-1) / (2 * bandwidth**2), 0)
    features = away.shape[1]
    design = torch.cat([torch.ones(len(away), 1, dtype=away.dtype), away], 1) * p.sqrt()[:, None]
    penalty = torch.eye(features + 1, dtype=away.dtype)[1:] * ridge**0.5
    targets = torch.cat([points.values * p.sqrt()[:, None], points.values.new_zeros(features, 2)])
    solution = torch.linalg.lstsq(torch.cat([design, penalty]), targets, driver="gelsd").solution
    return solution[0], solution[1:].mT, p


def without(points: Points, row: int) -> Points:
    return points.select(torch.arange(len(points.keys)) != row)


@pytest.mark.parametrize(("bandwidth", "ridge"), [(0.3, 1e-2), (1.0, 1e-3), (8.0, 1.0)])
def test_predictions_and_slopes_are_those_of_least_squares(bandwidth: float, ridge: float) -> None:
    points, queries = sample(40), sample(7, seed=1).keys
    fits = [least_squares(points, query, bandwidth, ridge) for query in queries]
    expected, slopes = torch.stack([fit[0] for fit in fits]), torch.stack([fit[1] for fit in fits])
    assert relative_error(predict(points, queries, bandwidth, ridge), expected) < BUDGET
    assert relative_error(fitted_slope(points, queries, bandwidth, ridge), slopes) < BUDGET


@pytest.mark.parametrize(("bandwidth", "ridge"), [(0.3, 1e-2), (1.0, 1e-3), (8.0, 1.0)])
@pytest.mark.parametrize(("n", "count"), [(2, 2), (2, 1), (3, 2), (37, 37), (150, 1), (150, 130)])
def test_leave_one_out_equals_fits_without_the_row(
    n: int, count: int, bandwidth: float, ridge: float
) -> None:
    points = sample(n)
    expected = torch.stack(
        [
            least_squares(without(points, i), points.keys[i], bandwidth, ridge)[0]
            for i in range(count)
        ]
    )
    assert relative_error(leave_one_out(points, count, bandwidth, ridge), expected) < BUDGET


def test_leave_one_out_of_lonely_points() -> None:
    """Their own weight is 1 to the last digit, so that nothing of the others is left beside it."""
    points = sample(30)
    bandwidth, ridge = 0.02, 1e-3
    expected = torch.stack(
        [least_squares(without(points, i), points.keys[i], bandwidth, ridge)[0] for i in range(30)]
    )
    own = torch.stack(
        [least_squares(points, key, bandwidth, ridge)[2].max() for key in points.keys]
    )
    assert (own == 1).any()
    assert relative_error(leave_one_out(points, 30, bandwidth, ridge), expected) < BUDGET


def test_leave_one_out_equals_deletion_from_the_full_fit() -> None:
    """o_(-i) = (o_i - h_ii v_i) / (1 - h_ii), in the full fit of ridge lambda (1 - p_ii).

    The penalty of a fit with relative ridge is ridge times the sum of its weights, so that the
    fit without i has the penalty of the full one if that has the ridge lambda (1 - p_ii). For a
    given penalty the identity is that of any penalised least-squares fit. Here h_ii, the signed
    weight of row i in its own fit, is the change of o_i per change of v_i.
    """
    points, bandwidth, ridge = sample(25), 0.8, 1e-2
    expected = leave_one_out(points, 25, bandwidth, ridge)
    deleted = []
    for i, key in enumerate(points.keys):
        p = least_squares(points, key, bandwidth, ridge)[2]
        full = least_squares(points, key, bandwidth, ridge * float(1 - p[i]))[0]
        unit = torch.zeros_like(points.values)
        unit[i] = 1.0
        moved = Points(points.keys, unit, points.log_weights)
        h = least_squares(moved, key, bandwidth, ridge * float(1 - p[i]))[0]
        deleted.append((full - h * points.values[i]) / (1 - h))
    assert relative_error(torch.stack(deleted), expected) < BUDGET


def test_its_own_value_does_not_count() -> None:
    points = sample(20)
    before = leave_one_out(points, 20, 0.5, 1e-2)
    values = points.values.clone()
    values[4] = 1e9
    after = leave_one_out(Points(points.keys, values, points.log_weights), 20, 0.5, 1e-2)
    assert torch.equal(after[4], before[4])
    assert not torch.isclose(after, before).all(1)[torch.arange(20) != 4].any()


def test_leave_one_out_needs_two_points() -> None:
    with pytest.raises(ValueError, match="at least two points"):
        leave_one_out(sample(1), 1, 1.0, 1.0)


def test_gradient_is_that_of_the_prediction() -> None:
    points, queries, step = sample(40), sample(5, seed=2).keys, 1e-5
    out, gradient = predict_with_gradient(points, queries, 0.6, 1e-2)
    assert relative_error(out, predict(points, queries, 0.6, 1e-2)) < BUDGET
    for feature in range(3):
        move = torch.zeros(3, dtype=torch.float64)
        move[feature] = step
        ahead, behind = (predict(points, queries + s * move, 0.6, 1e-2) for s in (1, -1))
        difference = (ahead - behind) / (2 * step)
        assert relative_error(gradient[:, :, feature], difference) < 1e-8  # O(step^2) and rounding


def test_gradient_inside_no_grad() -> None:
    with torch.no_grad():
        _, gradient = predict_with_gradient(sample(9), sample(2).keys, 1.0, 0.1)
    assert gradient.shape == (2, 2, 3)
    assert not gradient.requires_grad
