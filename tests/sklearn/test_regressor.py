"""The scikit-learn estimator: its rules, units, weights, and what it chooses."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_linnerud, make_friedman1
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import estimator_checks_generator

from regard.sklearn import LocalLinearRegressor

RULES = list(estimator_checks_generator(LocalLinearRegressor()))


def name_of(check: Any) -> str:
    options = ",".join(f"{name}={value}" for name, value in check.keywords.items())
    return f"{check.func.__name__}({options})"


def of_the_array_api(check: Any) -> bool:
    return "array_api" in name_of(check)


@pytest.mark.parametrize(
    ("estimator", "check"),
    [pytest.param(*rule, id=name_of(rule[1])) for rule in RULES if not of_the_array_api(rule[1])],
)
def test_rules_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


ARRAY_API = """
from sklearn.utils.estimator_checks import estimator_checks_generator
from regard.sklearn import LocalLinearRegressor
for estimator, check in estimator_checks_generator(LocalLinearRegressor()):
    if "array_api" in check.func.__name__:
        check(estimator)
"""


def test_rules_of_scikit_learn_for_the_array_api() -> None:
    """These skip themselves unless scipy was told of the array API before it was imported."""
    run = [sys.executable, "-c", ARRAY_API]
    subprocess.run(run, check=True, env={**os.environ, "SCIPY_ARRAY_API": "1"})


def curve(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth function of two features of very different units, with little noise."""
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(n, 2)) * [1.0, 1000.0] + [5.0, -2e4]
    y = np.sin(X[:, 0]) + ((X[:, 1] + 2e4) / 1000) ** 2 + 0.01 * draw.normal(size=n)
    return X, y


def test_leave_one_out_error_is_that_of_refitting() -> None:
    """Features standardised once, on all rows; every row is then predicted by a fit without it."""
    X, y = curve(40)
    model = LocalLinearRegressor().fit(X, y)
    Z = (X - X.mean(0)) / X.std(0)
    missed = []
    for i in range(40):
        rest = np.arange(40) != i
        p = np.exp(-np.square(Z[rest] - Z[i]).sum(1) / (2 * model.bandwidth_**2))
        root = np.sqrt(p / p.sum())[:, None]
        design = np.concatenate([root, root * (Z[rest] - Z[i])], 1)
        penalty = np.eye(3)[1:] * model.ridge_**0.5
        target = np.concatenate([root[:, 0] * y[rest], np.zeros(2)])
        missed.append(y[i] - np.linalg.lstsq(np.concatenate([design, penalty]), target)[0][0])
    assert model.loo_rmse_ == pytest.approx(np.sqrt(np.mean(np.square(missed))), rel=1e-5)
    error = model.loo_results_["error"]
    assert model.loo_rmse_ == pytest.approx(np.sqrt(error.min()) * y.std(), rel=1e-3)


def test_better_than_a_line_and_than_the_mean() -> None:
    X, y = curve(300)
    Xt, yt = curve(100, seed=1)
    model = LocalLinearRegressor().fit(X, y)
    rmse = np.sqrt(np.mean((model.predict(Xt) - yt) ** 2))
    line = np.sqrt(np.mean((LinearRegression().fit(X, y).predict(Xt) - yt) ** 2))
    assert rmse < 0.2 * line
    assert model.loo_rmse_ < 0.2 * line


def test_affine_data_are_predicted_exactly_anywhere() -> None:
    draw = np.random.default_rng(0)
    X = draw.normal(size=(50, 3)) * [1, 10, 1e-3] + 7
    W = np.array([[1.0, -0.5, 300.0], [0.0, 2.0, -1000.0]])
    model = LocalLinearRegressor(bandwidth=2.0, ridge=1e-12).fit(X, X @ W.T + 3)
    far = X[:5] + 20 * X.std(0)
    prediction, slope = model.predict(far, return_slope=True)
    np.testing.assert_allclose(prediction, far @ W.T + 3, rtol=1e-6)
    np.testing.assert_allclose(slope, np.broadcast_to(W, (5, 2, 3)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.local_slope(far), slope, rtol=1e-6, atol=1e-6)


def test_slope_is_the_derivative_in_the_units_of_the_data() -> None:
    X, y = curve(80)
    model = LocalLinearRegressor().fit(X, y)
    prediction, slope = model.predict(X[:6], return_slope=True)
    np.testing.assert_allclose(prediction, model.predict(X[:6]), rtol=1e-10)
    assert slope.shape == (6, 2)
    for feature, step in enumerate((1e-5, 1e-2)):
        move = step * np.eye(2)[feature]
        difference = (model.predict(X[:6] + move) - model.predict(X[:6] - move)) / (2 * step)
        np.testing.assert_allclose(slope[:, feature], difference, rtol=1e-6, atol=1e-8)


def test_several_outputs_are_those_of_one_at_a_time() -> None:
    X, Y = load_linnerud(return_X_y=True)
    together = LocalLinearRegressor(bandwidth=1.5, ridge=0.1).fit(X, Y)
    prediction, slope = together.predict(X, return_slope=True)
    assert prediction.shape == Y.shape
    assert slope.shape == (*Y.shape, X.shape[1])
    for output in range(Y.shape[1]):
        alone = clone(together).fit(X, Y[:, output])
        out, its_slope = alone.predict(X, return_slope=True)
        np.testing.assert_allclose(prediction[:, output], out, rtol=1e-10)
        np.testing.assert_allclose(slope[:, output], its_slope, rtol=1e-8, atol=1e-12)
    chosen = LocalLinearRegressor().fit(X, Y)
    assert chosen.loo_rmse_.shape == (3,)


def test_weights_are_repetitions() -> None:
    X, y = curve(60)
    weights = np.random.default_rng(1).integers(0, 4, 60)
    weighted = LocalLinearRegressor().fit(X, y, sample_weight=weights)
    repeated = LocalLinearRegressor().fit(np.repeat(X, weights, 0), np.repeat(y, weights))
    for name in ("bandwidth_", "ridge_", "loo_rmse_"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-6)
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-8)
    # Values of one place that differ are averaged, and their spread stays in the error.
    twice = LocalLinearRegressor().fit(np.concatenate([X, X]), np.concatenate([y - 9, y + 9]))
    once = LocalLinearRegressor(bandwidth=twice.bandwidth_, ridge=twice.ridge_).fit(X, y)
    np.testing.assert_allclose(once.predict(X), twice.predict(X), rtol=1e-8)
    assert twice.loo_rmse_ > 9


def test_order_of_rows_does_not_matter() -> None:
    X, y = curve(60)
    shuffled = np.random.default_rng(0).permutation(60)
    a = LocalLinearRegressor(loo_rows=20).fit(X, y)
    b = LocalLinearRegressor(loo_rows=20).fit(X[shuffled], y[shuffled])
    assert (a.bandwidth_, a.ridge_) == (b.bandwidth_, b.ridge_)
    np.testing.assert_allclose(a.predict(X), b.predict(X), rtol=1e-8)


def test_what_is_given_is_used() -> None:
    X, y = curve(30)
    model = LocalLinearRegressor(bandwidth=0.7, ridge=0.01).fit(X, y)
    assert (model.bandwidth_, model.ridge_) == (0.7, 0.01)
    assert model.loo_rmse_ is None
    assert model.loo_results_ == {}
    half = LocalLinearRegressor(bandwidth=0.7).fit(X, y)
    assert half.bandwidth_ == 0.7
    assert set(half.loo_results_["bandwidth"]) == {0.7}
    assert len(half.loo_results_["ridge"]) > 5


def test_single_row_constant_column_and_constant_target() -> None:
    one = LocalLinearRegressor().fit([[1.0, 2.0]], [3.0])
    assert one.predict([[9.0, 9.0]]) == pytest.approx([3.0])
    X, _ = curve(20)
    X[:, 1] = 0.1
    flat = LocalLinearRegressor().fit(X, np.full(20, 0.3))
    np.testing.assert_allclose(flat.predict(X + 5), 0.3, rtol=1e-12)


def test_float32_is_close_to_float64() -> None:
    X, y = curve(100)
    precise = LocalLinearRegressor().fit(X, y)
    given = {"bandwidth": precise.bandwidth_, "ridge": precise.ridge_}
    quick = LocalLinearRegressor(**given, dtype="float32").fit(X, y)
    error = np.linalg.norm(quick.predict(X) - precise.predict(X)) / np.linalg.norm(y)
    assert 0 < error < 2e-4


def test_lives_in_pipelines_and_files() -> None:
    X, y = make_friedman1(80, noise=0.1, random_state=0)
    model = LocalLinearRegressor(bandwidth=1.0, ridge=0.1).fit(X, y)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict(X), model.predict(X))
    for array in (copy._places.features, copy._places.values):
        array.flags.writeable = False  # as joblib's memory maps are
    np.testing.assert_array_equal(copy.predict(X), model.predict(X))
    found = GridSearchCV(LocalLinearRegressor(ridge=0.1), {"bandwidth": [0.01, 1.0]}, cv=3)
    assert found.fit(X, y).best_params_ == {"bandwidth": 1.0}


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"bandwidth": 0.0}, ValueError, "bandwidth must be a finite number above 0.0, got 0.0"),
        ({"ridge": "much"}, TypeError, "ridge must be a number above 0.0, got 'much'"),
        ({"loo_rows": 0}, ValueError, "loo_rows must be an int of at least 1, got 0"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of 'float64', 'float32'"),
        ({"device": "gpu"}, ValueError, "device must be a device that torch can use here"),
        ({"device": "cuda:99"}, ValueError, "device must be a device that torch can use here"),
    ],
)
def test_parameters_that_do_not_fit(
    parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LocalLinearRegressor(**parameters).fit([[1.0], [2.0]], [1.0, 2.0])


def test_data_that_do_not_fit() -> None:
    X, y = curve(10)
    with pytest.raises(NotFittedError):
        LocalLinearRegressor().predict(X)
    with pytest.raises(ValueError, match="sample_weight must be above 0|at least one non-zero"):
        LocalLinearRegressor().fit(X, y, sample_weight=np.zeros(10))
    with pytest.raises(ValueError, match="[Nn]egative"):
        LocalLinearRegressor().fit(X, y, sample_weight=-np.ones(10))
    with pytest.raises(ValueError, match="X must be of finite variance"), np.errstate(all="ignore"):
        LocalLinearRegressor().fit(X * 1e300, y)
    model = LocalLinearRegressor().fit(X, y)
    with pytest.raises(TypeError, match="return_slope must be True or False, got 1"):
        model.predict(X, return_slope=1)


CHILD = """
import json, resource
import numpy as np
from regard.sklearn import LocalLinearRegressor

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

draw = np.random.default_rng(0)
X = draw.normal(size=(8000, 2))
y = np.sin(X[:, 0])
model = LocalLinearRegressor(bandwidth=0.3, ridge=0.01)
model.fit(X[:500], y[:500]).predict(X[:500])
before = peak()
model.fit(X, y).predict(X)
from regard.sklearn.points import leave_one_out
leave_one_out(model._points(model._places), 8000, 0.3, 0.01, 1e-6)
print(json.dumps(peak() - before))
"""


def test_memory_is_linear_in_the_rows() -> None:
    """One n x n matrix would be 488 MB."""
    run = [sys.executable, "-c", CHILD]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) < 200


def test_importing_the_library_leaves_scikit_learn_alone() -> None:
    child = "import sys, regard; print('sklearn' in sys.modules, regard.sklearn.__name__)"
    run = [sys.executable, "-c", child]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "regard.sklearn"]


def test_without_scikit_learn_the_error_says_what_to_install() -> None:
    child = "import sys; sys.modules['sklearn'] = None; import regard; regard.sklearn"
    run = [sys.executable, "-c", child]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'regard[sklearn]'")
