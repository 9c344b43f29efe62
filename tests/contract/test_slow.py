"""The full product: every mechanism, law, pattern and case."""

from __future__ import annotations

import time

import pytest

import regard
from regard.testing import LAWS, Planner, check
from regard.testing.check import apply

pytestmark = pytest.mark.slow
FAST_TIER_SECONDS = 12.0

VISITS = [
    pytest.param(name, law.name, v.subject.pattern, v.subject.case, id=f"{name}-{law.name}-"
                 f"{v.subject.pattern.value}-{v.subject.case.name}")
    for name, card in regard.mechanisms.items()
    for law in LAWS.values()
    if law.name not in card.laws_except  # the fast tier visits these everywhere
    for v in Planner(card, tier="slow").visits(law)
]  # fmt: skip


@pytest.mark.parametrize(("name", "law", "pattern", "case"), VISITS)
def test_law(name, law, pattern, case, device, seed, record_property) -> None:
    planner = Planner(regard.mechanisms[name], device, "slow", seed)
    visits = [v for v in planner.visits(LAWS[law], [pattern]) if v.subject.case is case]
    (row,) = map(apply, visits)
    if not row.ok:
        raise AssertionError(row.detail) from row.error
    if row.outcome == "does not apply":
        record_property("not applicable", row.detail)


@pytest.mark.parametrize("name", list(regard.mechanisms))
def test_the_fast_tier_is_fast(name, device, seed) -> None:
    card = regard.mechanisms[name]
    check(card, device=device, laws=["compile", "meta"], seed=seed)  # torch's own imports
    start = time.process_time()
    check(card, device=device, seed=seed).raise_if_failed()
    spent = time.process_time() - start
    assert spent <= FAST_TIER_SECONDS, f"{name}: {spent:.1f} CPU-seconds"
