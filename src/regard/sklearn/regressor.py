"""Local linear attention as a scikit-learn regressor for tables."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from regard.core import checks
from regard.core.checks import reject, words
from regard.sklearn import points
from regard.sklearn.places import Places, Scaling
from regard.sklearn.points import Points
from regard.sklearn.search import Search

NAME = "LocalLinearRegressor"
LOO_TOL = 1e-6  # of the solves that only choose a setting


class LocalLinearRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Regression by a ridge-regularised linear fit around every row that is to be predicted.

    With standardised features k_j of the training rows, x of the row to predict, sample weights
    w_j and the bandwidth h,

        p_j = w_j exp(-|x - k_j|^2 / (2 h^2)) / (the sum of these over j),
        prediction = b,  (b, W) = argmin sum_j p_j |y_j - b - W (k_j - x)|^2 + ridge |W|^2,

    which is `regard.ops.local_linear_attention` with x as query, k as keys and y as values. A
    large bandwidth makes one linear fit for all rows, a large ridge local averages.

    Args:
        bandwidth: h, in standard deviations of the features; None chooses it.
        ridge: lambda, on standardised features; None chooses it.
        loo_rows: how many training rows the choice is judged on, drawn at random if there are
            more; None takes all. All other rows are always the data they are predicted from.
        dtype: "float64" or "float32", of the computation.
        device: where torch computes, such as "cpu" or "cuda".
        random_state: draws the rows for `loo_rows`; of no other effect.

    Attributes:
        bandwidth_, ridge_: what is used.
        loo_rmse_: root mean squared leave-one-out error of the chosen setting, one per output
            (a number for one-dimensional y); None where nothing was to choose, or only one
            distinct row was there to choose on.
        loo_results_: what was tried: dict of arrays "bandwidth", "ridge" and "error" (the mean
            over outputs of squared error / variance); empty where nothing was.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Shapes: X [n, D], dense and finite; y [n] or [n, p]; predictions as y. Bandwidth and ridge
    are shared by all outputs.

    Choosing: exact leave-one-out errors on a grid of 8 bandwidths and 6 ridges, then half-steps
    around the best (features are standardised once, on all rows). Rows with equal features are
    one place, left out together, so that a sample weight of 2 equals a row that is there twice,
    and a weight of 0 a row that is not there.

    Precision: float64 throughout by default, every fit solved to a relative residual of 1e-12
    (1e-6 while choosing); predictions equal those of least squares to 1e-10. With "float32" the
    op's default tolerance gives about 1e-4.
    Cost: O(m n) for the predictions of m rows, times D^2 or the number of solver steps times D;
    a fit costs about 60 times that with m = loo_rows. Memory O(m + n), no m x n matrix.
    Source: local linear regression, Fan and Gijbels, Local Polynomial Modelling and Its
    Applications, 1996; as attention, Zuo et al., arXiv 2510.01450.
    Limits: one bandwidth for all features, so that features without influence blur it: leave
    them out. A prediction far from all training rows is an extrapolation of the nearest trend.
    No sparse matrices, no missing values.
    Raises: ValueError, TypeError: parameters or data that do not fit, as in scikit-learn.

    >>> import numpy as np
    >>> X = np.linspace(-2, 2, 60)[:, None]
    >>> model = LocalLinearRegressor().fit(X, np.sin(X[:, 0]))
    >>> prediction, slope = model.predict([[0.5]], return_slope=True)
    >>> bool(abs(prediction[0] - np.sin(0.5)) < 1e-3), bool(abs(slope[0, 0] - np.cos(0.5)) < 1e-2)
    (True, True)
    """

    def __init__(
        self,
        *,
        bandwidth: float | None = None,
        ridge: float | None = None,
        loo_rows: int | None = 1000,
        dtype: Literal["float64", "float32"] = "float64",
        device: str = "cpu",
        random_state: Any = 0,
    ) -> None:
        self.bandwidth = bandwidth
        self.ridge = ridge
        self.loo_rows = loo_rows
        self.dtype = dtype
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LocalLinearRegressor:
        """Keeps the training rows, standardised, and chooses what was not given."""
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weights.any():
            raise reject(NAME, "sample_weight", "above 0 somewhere", words("zeros only"))
        weights = weights / weights.max()
        counted = weights > 0
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1)[counted].astype(np.float64)
        X, weights = X[counted], weights[counted]
        self._features, self._outputs = Scaling.of(X, weights), Scaling.of(y, weights)
        for name, scaling in (("X", self._features), ("y", self._outputs)):
            if not np.isfinite([scaling.mean, scaling.deviation]).all():
                raise reject(NAME, name, "of finite variance in float64", words("larger values"))
        self._places = Places.of(self._features.apply(X), self._outputs.apply(y), weights)
        self._choose()
        return self

    def predict(self, X: Any, return_slope: bool = False) -> Any:
        """Predictions [n] or [n, p] as y was; with `return_slope` also their derivatives.

        The derivative d prediction / d x, in the units of y per unit of each feature, is exact
        ([n, D] or [n, p, D]); it costs about two predictions more for each output.
        """
        checks.check_flag(NAME, "return_slope", return_slope)
        queries = self._queries(X)
        fit = self._points(self._places), queries, self.bandwidth_, self.ridge_
        if not return_slope:
            return self._in_units(points.predict(*fit))
        out, slope = points.predict_with_gradient(*fit)
        return self._in_units(out), self._slope_in_units(slope)

    def local_slope(self, X: Any) -> np.ndarray:
        """W, the slope of the plane fitted around each row [n, D] or [n, p, D].

        In the units of y per unit of each feature. Unlike the derivative of the prediction, it
        holds the weights of the training rows fixed: the usual estimate of the slope of what
        the data follow, and a smoother one.
        """
        queries = self._queries(X)
        slope = points.fitted_slope(
            self._points(self._places), queries, self.bandwidth_, self.ridge_
        )
        return self._slope_in_units(slope)

    def _check_parameters(self) -> None:
        for name in ("bandwidth", "ridge"):
            value = getattr(self, name)
            if value is not None:
                checks.check_number(NAME, name, value, above=0.0)
        if self.loo_rows is not None:
            checks.check_integer(NAME, "loo_rows", self.loo_rows)
        checks.check_choice(NAME, "dtype", self.dtype, ("float64", "float32"))
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, TypeError):  # as torch says it of names, of CUDA, ...
            accepted = "a device that torch can use here, such as 'cpu'"
            raise reject(NAME, "device", accepted, self.device) from None

    def _choose(self) -> None:
        places = self._places
        errors = _LeaveOneOut(self, places)
        search = Search(errors.mean, places.features.shape[1], self.bandwidth, self.ridge)
        self.loo_rmse_, self.loo_results_ = None, {}
        if (self.bandwidth is None or self.ridge is None) and len(places.weights) > 1:
            search.run()
            settings = [search.setting(step) for step in search.tried]
            self.loo_results_ = {
                "bandwidth": np.array([bandwidth for bandwidth, _ in settings]),
                "ridge": np.array([ridge for _, ridge in settings]),
                "error": np.array(list(search.tried.values())),
            }
            rmse = np.sqrt(errors(*search.setting(search.best))) * self._outputs.deviation
            self.loo_rmse_ = float(rmse[0]) if self._flat else rmse
        self.bandwidth_, self.ridge_ = map(float, search.setting(search.best))

    def _points(self, places: Places) -> Points:
        """On the device."""
        weights = np.log(places.weights)
        return Points(*map(self._tensor, (places.features, places.values, weights)))

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        # A model that was sent to another process may be read-only, which torch warns about.
        array = np.require(x, requirements=["C", "W"])
        return torch.from_numpy(array).to(self.device, getattr(torch, self.dtype))

    def _queries(self, X: Any) -> torch.Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self._tensor(self._features.apply(X))

    def _in_units(self, prediction: torch.Tensor) -> np.ndarray:
        out = prediction.double().cpu().numpy() * self._outputs.deviation + self._outputs.mean
        return out[:, 0] if self._flat else out

    def _slope_in_units(self, slope: torch.Tensor) -> np.ndarray:
        out = slope.double().cpu().numpy() * self._outputs.deviation[:, None]
        out = out / self._features.deviation
        return out[:, 0] if self._flat else out


class _LeaveOneOut:
    """Mean squared leave-one-out errors of a setting, per output, on some of the places."""

    def __init__(self, model: LocalLinearRegressor, places: Places) -> None:
        count = len(places.weights)
        if model.loo_rows is not None and count > model.loo_rows:
            order = check_random_state(model.random_state).permutation(count)
            places, count = places.select(order), model.loo_rows
        self.points = model._points(places)
        self.count = count
        self.judged = places.select(np.arange(count))

    def __call__(self, bandwidth: float, ridge: float) -> np.ndarray:
        out = points.leave_one_out(self.points, self.count, bandwidth, ridge, LOO_TOL)
        missed = self.judged.values - out.double().cpu().numpy()
        weights = self.judged.weights
        total = (weights[:, None] * np.square(missed) + self.judged.spread).sum(0)
        return total / weights.sum()

    def mean(self, bandwidth: float, ridge: float) -> float:
        """Over outputs, whose variance is 1."""
        return float(self(bandwidth, ridge).mean())
