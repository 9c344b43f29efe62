"""Every law catches the fault that it is there for."""

from __future__ import annotations

from dataclasses import replace

import pytest

import regard
from regard.testing import LAWS, check
from testing.mutants import MUTANTS, dense_attention, sick

# Where a rotated law would by chance stand on a pattern in which the fault is none.
PLACES = {"long": ["causal_self"]}
PAIRS = [(name, law) for name, (laws, _) in MUTANTS.items() for law in laws]


@pytest.mark.parametrize(("name", "law"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_caught(name: str, law: str) -> None:
    report = check(sick(name), laws=[law], patterns=PLACES.get(law), seed=0)
    assert not report.ok, str(report)
    for row in report.failures:
        assert f"law {law}" in row.detail
        assert "reproduce: regard.testing.check(" in row.detail


def test_every_law_has_a_mutant() -> None:
    slow = {name for name, law in LAWS.items() if law.cost == "slow"}
    assert {law for _, law in PAIRS} == set(LAWS) - slow


@pytest.mark.slow
def test_memory_of_a_process() -> None:
    card = regard.mechanisms["softmax"]
    settings = {"tier": "slow", "laws": ["memory_process", "memory"], "seed": 0}
    card = replace(card, cases=card.cases[:1], patterns=card.patterns[:1])
    healthy = check(card, **settings)
    assert healthy.ok, str(healthy)
    report = check(replace(card, op=dense_attention, state=None), **settings)
    assert {row.law: row.outcome for row in report.rows} == {
        "memory": "passed",  # it looks at operators only
        "memory_process": "failed",
    }
