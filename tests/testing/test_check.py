"""`check` as a third party meets it."""

from __future__ import annotations

from dataclasses import replace

import pytest

import regard
from regard import Case, Pattern
from regard.testing import LAWS, CheckFailed, Planner, check
from testing.mutants import sick

SOFTMAX = regard.mechanisms["softmax"]
PLAIN = replace(SOFTMAX, cases=SOFTMAX.cases[:1])
CHEAP = ["equals_reference", "forms", "empty", "deterministic", "packed"]


def test_a_healthy_mechanism_is_ok_and_says_so() -> None:
    report = check(SOFTMAX, laws=CHEAP, seed=3)
    assert report.ok
    assert report.raise_if_failed() is report
    first, *lines = str(report).splitlines()
    assert first.startswith("softmax on cpu, fast tier, seed 3: ok (")
    assert {line.split()[0] for line in lines[1:]} == set(CHEAP)


def test_a_failure_says_where_by_how_much_and_how_to_see_it_again() -> None:
    report = check(
        sick("slightly_wrong"), laws=["equals_reference"], patterns=["causal_self"], seed=4
    )
    assert not report.ok
    (row,) = report.failures
    for word in (
        "card softmax, law equals_reference, pattern causal_self, case default, seed 4", "float64",
        "relative error 0.0001, budget 1e-10 (value)",
    ):  # fmt: skip
        assert word in row.detail
    with pytest.raises(CheckFailed, match="relative error"):
        report.raise_if_failed()
    line = row.detail.split("reproduce: ")[1]
    assert eval(line, {"regard": regard}).seed == 4


def test_the_reproduction_visits_the_same_place_with_the_same_values() -> None:
    card = sick("rolls_dice")
    whole = check(card, laws=["deterministic", "equals_reference"], seed=11)
    again = check(card, laws=["deterministic"], patterns=[whole.failures[0].pattern], seed=11)
    assert [(r.law, r.pattern, r.case) for r in again.rows] == [
        (r.law, r.pattern, r.case) for r in whole.rows if r.law == "deterministic"
    ]


def test_every_error_of_an_op_becomes_a_row() -> None:
    def op(q, k, v, *, causal=False):
        raise ZeroDivisionError("by zero")

    report = check(replace(PLAIN, op=op, state=None), seed=0, laws=["equals_reference", "meta"])
    assert {row.outcome for row in report.rows} == {"failed"}
    assert "ZeroDivisionError: by zero" in report.rows[0].detail


def test_an_excepted_law_must_break() -> None:
    reason = "it centres its keys on a mean over all of them"
    broken = sick("centres_keys_on_a_mean_that_contains_the_future")
    report = check(replace(broken, laws_except={"no_leak": reason}), laws=["no_leak"], seed=0)
    assert report.ok
    assert [row.outcome for row in report.rows] == ["excepted"]
    assert reason in report.rows[0].detail
    report = check(replace(SOFTMAX, laws_except={"no_leak": reason}), laws=["no_leak"], seed=0)
    assert not report.ok
    assert "remove the exception" in str(report)


def test_what_does_not_apply_is_told_and_not_passed() -> None:
    def softmax_attention(q, k, v, *, causal=False, scale=None):
        return SOFTMAX.op(q, k, v, causal=causal, scale=scale)

    card = replace(
        PLAIN, op=softmax_attention, state=None, patterns=[Pattern.NONCAUSAL_SELF],
        memory="quadratic",
    )  # fmt: skip
    outcomes = {row.law: row for row in check(card, seed=0, laws=[
        "decode", "padding", "packed", "no_leak", "memory", "forms", "equals_reference",
    ]).rows}  # fmt: skip
    assert outcomes.pop("equals_reference").outcome == "passed"
    assert {row.outcome for row in outcomes.values()} == {"does not apply"}
    assert outcomes["decode"].detail == "the op has no argument state"
    assert outcomes["no_leak"].detail == "of none of its patterns"


def test_a_case_may_fix_sizes() -> None:
    cases = (Case("square", {}, {"T": 8, "S": 8, "D": 6, "H": 3, "Hk": 3}),)
    card = replace(SOFTMAX, cases=cases)
    report = check(card, seed=0, laws=[n for n in LAWS if n not in ("compile", "export")])
    assert report.ok, str(report)
    silent = {row.law for row in report.rows if row.outcome == "does not apply"}
    assert {"odd_lengths", "query_key_lengths", "decode", "grouped_queries"} <= silent


def test_a_looser_budget_of_the_card_counts() -> None:
    card = sick("slightly_wrong")
    loose = {"float64": (2e-4, "measured: 1e-4"), "float32": (2e-4, "measured: 1e-4")}
    assert check(replace(card, budgets=loose), laws=["equals_reference"], seed=0).ok


@pytest.mark.parametrize("tier", ["fast", "slow"])
def test_a_plan_covers_what_it_says(tier: str) -> None:
    planner = Planner(SOFTMAX, tier=tier, seed=1)  # type: ignore[arg-type]
    for law in LAWS.values():
        places = [(v.subject.pattern, v.subject.case.name) for v in planner.visits(law)]
        assert len(set(places)) == len(places)
        fitting = law.applicable(SOFTMAX)
        if tier == "slow":
            assert len(places) == len(fitting) * len(SOFTMAX.cases)
        elif law.cost == "cheap":
            assert [pattern for pattern, _ in places] == list(fitting)
        else:
            assert len(places) == (law.cost != "slow")


def test_seeds_rotate_places() -> None:
    places = {
        (v.subject.pattern, v.subject.case.name)
        for seed in range(100)
        for v in Planner(SOFTMAX, seed=seed).visits(LAWS["autocast"])
    }
    assert len(places) == 4 * len(SOFTMAX.cases)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"laws": ["equals_refrence"]}, ValueError, "did you mean 'equals_reference'"),
        ({"laws": "equals_reference"}, TypeError, "must be a list"),
        ({"patterns": ["causal"]}, ValueError, "patterns must be among"),
        ({"patterns": "causal_self"}, TypeError, "must be a list"),
        ({"tier": "medium"}, ValueError, "tier must be"),
    ],
)
def test_wrong_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        check(SOFTMAX, **arguments)
    with pytest.raises(TypeError, match=r"card must be a regard\.Card"):
        check("softmax")  # type: ignore[arg-type]


def test_a_missing_device_is_refused_once(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"check: device must be .* no CUDA, got 'cuda'"):
        check(SOFTMAX, device="cuda")
    with pytest.raises(ValueError, match="check: device must be 'cpu' or 'cuda', got 'gpu'"):
        check(SOFTMAX, device="gpu")
