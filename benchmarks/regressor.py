"""LocalLinearRegressor against scikit-learn's regressors, on data that ship with scikit-learn.

Run: python benchmarks/regressor.py           (about ten minutes; --page only remakes the tables)
Needs the extra `sklearn`. Accuracy only: it does not depend on how busy the machine is. Writes
results/regressor.json and the tables of docs/regressor.md; a test holds that both agree.

Five outer folds; every method chooses its settings within the training part alone: by 5-fold
cross-validation, LocalLinearRegressor and RidgeCV by leave-one-out.
"""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/regressor.json"
PAGE = ROOT / "docs/regressor.md"
FOLDS = 5
OURS = "local linear"
# Below this a difference of squared errors is within the noise of the rows that were drawn.
NOISE = 2.0


def data_sets() -> Iterator[tuple[str, str, Any, Any]]:
    """Name, what is predicted from what, X and y."""
    from sklearn import datasets

    X, y = datasets.load_diabetes(return_X_y=True)
    yield "diabetes", "progression after a year from ten measurements", X, y
    wine = datasets.load_wine().data
    yield "wine", "alcohol from the other twelve measurements", wine[:, 1:], wine[:, 0]
    iris = datasets.load_iris().data
    yield "iris", "petal width from the other three lengths", iris[:, :3], iris[:, 3]
    cells = datasets.load_breast_cancer().data[:, :10]
    yield "cells", "mean fractal dimension from the other nine means", cells[:, :9], cells[:, 9]
    X, y = datasets.make_friedman1(400, n_features=10, noise=1.0, random_state=0)
    yield "friedman1", "a formula of five features, five more are irrelevant; noise 1", X, y
    yield "friedman1, five", "the same without the irrelevant features", X[:, :5], y
    X, y = datasets.make_friedman2(400, noise=50.0, random_state=0)
    yield "friedman2", "the impedance of a circuit; noise 50", X, y
    X, y = datasets.make_friedman3(400, noise=0.1, random_state=0)
    yield "friedman3", "the phase of a circuit; noise 0.1", X, y


def methods(features: int) -> dict[str, Any]:
    """Unfitted estimators by name; what they choose from is here."""
    import numpy as np
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from regard.sklearn import LocalLinearRegressor

    inner = KFold(FOLDS, shuffle=True, random_state=1)

    def tuned(estimator: Any, grid: dict[str, Any]) -> Any:
        return GridSearchCV(estimator, grid, cv=inner, scoring="neg_mean_squared_error")

    def standardised(estimator: Any) -> Any:
        centred = TransformedTargetRegressor(estimator, transformer=StandardScaler())
        return make_pipeline(StandardScaler(), centred)

    kernel = "transformedtargetregressor__regressor__"
    return {
        OURS: LocalLinearRegressor(),
        "local average": LocalLinearRegressor(ridge=1e9),
        "linear ridge": standardised(RidgeCV(np.logspace(-3, 4, 29))),
        "k nearest neighbours": tuned(
            make_pipeline(StandardScaler(), KNeighborsRegressor()),
            {
                "kneighborsregressor__n_neighbors": [1, 2, 3, 5, 8, 12, 20, 30],
                "kneighborsregressor__weights": ["uniform", "distance"],
            },
        ),
        "kernel ridge": tuned(
            standardised(KernelRidge(kernel="rbf")),
            {
                f"{kernel}gamma": np.logspace(-3, 1, 9) / features,
                f"{kernel}alpha": np.logspace(-5, 1, 13),
            },
        ),
        "gradient boosting": tuned(
            GradientBoostingRegressor(subsample=0.5, random_state=0),
            {
                "learning_rate": [0.03, 0.1],
                "max_depth": [1, 2, 3, 4],
                "n_estimators": [100, 300],
            },
        ),
    }


def compare(X: Any, y: Any) -> dict[str, Any]:
    """Cross-validated errors of every method, and how sure the differences from ours are."""
    import numpy as np
    from sklearn.base import clone
    from sklearn.model_selection import KFold, cross_val_predict

    outer = KFold(FOLDS, shuffle=True, random_state=0)
    squared = {
        name: np.square(cross_val_predict(clone(method), X, y, cv=outer) - y)
        for name, method in methods(X.shape[1]).items()
    }
    found = {}
    for name, errors in squared.items():
        difference = errors - squared[OURS]
        spread = difference.std(ddof=1) / math.sqrt(len(y))
        found[name] = {
            "rmse": float(f"{math.sqrt(errors.mean()):.5g}"),
            "t": float(f"{difference.mean() / spread:.3g}") if spread else 0.0,
        }
    return found


def table(results: dict[str, Any]) -> str:
    """Errors in units of the target's standard deviation, the least of a row in bold."""
    data = results["data"]
    names = list(next(iter(data.values()))["methods"])
    lines = [
        "| data | rows x features | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for name, entry in data.items():
        shown = [f"{entry['methods'][m]['rmse'] / entry['deviation']:.3f}" for m in names]
        cells = [f"**{cell}**" if cell == min(shown) else cell for cell in shown]
        size = f"{entry['rows']} x {entry['features']}"
        lines.append(f"| {name} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def findings(results: dict[str, Any]) -> str:
    """One line for every data set: whom it beats, whom it loses to, what is within the noise."""
    lines = []
    for name, entry in results["data"].items():
        others = {m: score["t"] for m, score in entry["methods"].items() if m != OURS}
        told = {
            "loses to": [m for m, t in others.items() if t < -NOISE],
            "beats": [m for m, t in others.items() if t > NOISE],
            "within the noise of": [m for m, t in others.items() if abs(t) <= NOISE],
        }
        parts = [f"{verb} {', '.join(whom)}" for verb, whom in told.items() if whom]
        lines.append(f"- **{name}** ({entry['task']}): {'; '.join(parts)}.")
    return "\n".join(lines) + "\n"


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with both marked parts made anew."""
    for name, content in (("errors", table(results)), ("findings", findings(results))):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}{m[2]}", page, flags=re.S)
        if count != 1:
            raise ValueError(f"{PAGE.name} must mark {name} once, found {count} marks")
    return page


def main() -> None:
    """Writes the results, unless only the page is asked for, and the page."""
    if sys.argv[1:] != ["--page"]:
        measure()
    PAGE.write_text(filled(PAGE.read_text(), json.loads(RESULTS.read_text())))


def measure() -> None:
    """Writes results/regressor.json."""
    import sklearn
    import torch

    import regard
    from regard.core.state import write_atomically

    data = {}
    for name, task, X, y in data_sets():
        rows, features = X.shape
        data[name] = {
            "task": task,
            "rows": rows,
            "features": features,
            "deviation": float(f"{y.std():.5g}"),
            "methods": compare(X, y),
        }
        print(name, json.dumps(data[name]["methods"]), flush=True)
    versions = {
        "regard": regard.__version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    content = json.dumps({"versions": versions, "data": data}, indent=1, ensure_ascii=False)
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomically(RESULTS, (content + "\n").encode())


if __name__ == "__main__":
    main()
