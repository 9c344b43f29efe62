"""The work that an algorithm asks for, counted from what it did."""

from __future__ import annotations

from torch import Tensor

from regard.bench.kernels import family, sparse
from regard.bench.kernels.case import Case


def forward(case: Case, iterations: Tensor | None) -> float | None:
    """Multiplications and additions of a forward.

        softmax           4 D           a visible pair: scores, outputs
        given probe       6 D           and its product with the keys
        conjugate grad.   8 D + 4 D T   scores, mean key, probe, outputs; T steps of two products
        direct            8 D + D (D + 1)   and half of a symmetric matrix

    `iterations` [B, H, T] are each query's own; all 0: the solve was direct. The linear family:
    `family.work`; chosen blocks and windows: `sparse.work`. None where nobody has counted it.
    """
    if case.fixed_state:
        return None if case.work == "decode" else family.work(case)
    if case.mechanism in sparse.MECHANISMS:
        return sparse.work(case)
    D, seen = case.dim, case.seen
    if case.mechanism == "softmax":
        return 4.0 * D * case.pairs
    if case.mechanism == "parallax":
        return 6.0 * D * case.pairs
    assert iterations is not None
    if not bool(iterations.any()):
        return (8.0 * D + D * (D + 1)) * case.pairs
    each = 8.0 * D + 4.0 * D * iterations[0].double().cpu()
    return float((each * seen).sum())
