"""Every mechanism before every law that applies to it: the fast tier, one test per card and law."""

from __future__ import annotations

import time

import pytest

import regard
from regard.testing import LAWS, Planner
from regard.testing.check import judge

PAIRS = [
    pytest.param(name, law, id=f"{name}-{law.name}")
    for name, card in regard.mechanisms.items()
    for law in LAWS.values()
    if Planner(card).visits(law)
]


@pytest.mark.parametrize(("name", "law"), PAIRS)
def test_law(name, law, device, seed, record_property) -> None:
    start = time.process_time()
    visits = Planner(regard.mechanisms[name], device, "fast", seed).visits(law)
    rows = judge(visits)
    record_property("fast tier", [name, time.process_time() - start])
    settle(rows, record_property)


def settle(rows, record_property) -> None:
    """Turns rows into the outcome of a test."""
    failures = [row for row in rows if not row.ok]
    if failures:
        details = "\n\n".join(f"{row.pattern}, {row.case}: {row.detail}" for row in failures)
        raise AssertionError(details) from failures[0].error
    for row in rows:
        if row.outcome == "excepted":
            pytest.xfail(row.detail)
    if all(row.outcome == "does not apply" for row in rows):
        record_property("not applicable", rows[0].detail)
