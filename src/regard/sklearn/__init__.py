"""Estimators for scikit-learn; needs the extra `sklearn`: `pip install 'regard[sklearn]'`."""

from __future__ import annotations

try:
    import sklearn  # noqa: F401 (the package of that name, not this folder)
except ImportError as error:
    error.add_note("regard.sklearn needs scikit-learn: pip install 'regard[sklearn]'")
    raise

from regard.sklearn.regressor import LocalLinearRegressor

__all__ = ["LocalLinearRegressor"]
