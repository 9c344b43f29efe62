"""The search for bandwidth and ridge."""

from __future__ import annotations

import math

import pytest

from regard.sklearn.search import BANDWIDTHS, RIDGES, Search


def bowl(bandwidth: float, ridge: float) -> float:
    """Least at bandwidth 0.9 sqrt(4), ridge 0.02."""
    return 1 + math.log2(bandwidth / 1.8) ** 2 + math.log10(ridge / 0.02) ** 2


def test_finds_the_nearest_half_step() -> None:
    found = Search(bowl, 4, None, None).run()
    bandwidth, ridge = found.setting(found.best)
    assert bandwidth == pytest.approx(2.0)
    assert ridge == pytest.approx(10**-1.5)
    assert len(found.tried) < len(BANDWIDTHS) * len(RIDGES) + 20


def test_goes_on_beyond_the_grid() -> None:
    found = Search(lambda bandwidth, ridge: bandwidth + ridge, 1, None, None).run()
    bandwidth, ridge = found.setting(found.best)
    assert bandwidth < 1 / 16
    assert ridge < 1e-4


def test_what_is_given_stays() -> None:
    found = Search(bowl, 4, 0.7, None).run()
    assert found.setting(found.best) == (0.7, pytest.approx(10**-1.5))
    found = Search(bowl, 4, None, 0.7).run()
    assert found.setting(found.best) == (pytest.approx(2.0), 0.7)
    assert Search(bowl, 4, 0.3, 0.7).setting((1, 1)) == (0.3, 0.7)


def test_ties_go_to_the_larger_ridge_and_failures_lose() -> None:
    tied = Search(lambda bandwidth, ridge: 1.0, 1, None, None).run()
    assert tied.setting(tied.best)[1] >= 10.0
    failing = Search(lambda b, r: math.nan if r > 1e-3 else 2.0, 1, None, None).run()
    assert failing.setting(failing.best)[1] == pytest.approx(1e-3)
    never = Search(lambda b, r: math.nan, 1, None, None).run()
    assert never.setting(never.best)[1] >= 10.0
