"""Cards: what is refused, and what the rest of the library reads off them."""

from __future__ import annotations

import copy
import pickle

import pytest

from regard.core.card import Card, Case, Operand, Paper
from regard.core.patterns import ALL_PATTERNS, Pattern


def op(q, k, v, *, causal=False, key_mask=None):
    """Does nothing, in one line.

    And some more.
    """


def undocumented(q, k, v): ...


def card(**changes):
    fields = {"name": "toy", "paper": Paper("Toy"), "op": op, "reference": op}
    return Card(**{**fields, **changes})


def test_defaults():
    made = card()
    assert made.patterns == ALL_PATTERNS
    assert made.cases == (Case("default"),)
    assert (made.operands, made.state, made.memory) == ((), None, "linear")
    assert dict(made.tune) == {}


def test_what_the_op_says_of_itself():
    assert card().summary == "Does nothing, in one line."
    assert card(op=undocumented).summary == ""
    assert card().accepts("key_mask")
    assert not card().accepts("window")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "Toy"}, "name must be lower_snake_case"),
        ({"name": "toy-2"}, "name must be lower_snake_case"),
        ({"laws_except": {"crop": ""}}, r"laws_except\['crop'\] needs a reason"),
        ({"budgets": {"float32": (1e-3, "so")}}, r"budgets\['float32'\] needs a measured reason"),
        ({"tune": {"ridge": ()}}, r"tune\['ridge'\] needs at least one value"),
        ({"cases": ()}, "at least one Pattern and one Case"),
        ({"patterns": ()}, "at least one Pattern and one Case"),
        ({"memory": "quadratical"}, "memory must be 'linear' or 'quadratic'"),
        ({"state": "growing"}, "state must be 'cache', 'fixed' or None"),
    ],
)
def test_bad_cards_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        card(**changes)


@pytest.mark.parametrize("bad", [{"shape": "b h x"}, {"source": "value"}, {"domain": "negative"}])
def test_bad_operands_are_refused(bad):
    with pytest.raises(ValueError, match="unknown axis, source or domain"):
        Operand("gate", **bad)


def test_a_card_is_not_changed_by_what_it_was_made_of():
    cases, tune = [Case()], {"ridge": (1.0,)}
    made = card(cases=cases, tune=tune)
    cases.append(Case("more"))
    tune["scale"] = (2.0,)
    assert len(made.cases) == 1
    assert list(made.tune) == ["ridge"]
    with pytest.raises(TypeError):
        made.tune["scale"] = (1.0,)


def test_cards_travel_to_other_processes_and_into_sets():
    made = card(tune={"ridge": (0.1, 1.0)}, laws_except={"crop": "keeps no past"})
    twin = pickle.loads(pickle.dumps(made))
    assert (twin.name, twin.op, dict(twin.tune)) == ("toy", op, {"ridge": (0.1, 1.0)})
    assert copy.deepcopy(made).laws_except["crop"] == "keeps no past"
    assert made in {made}


def test_patterns_are_promises_around_the_causal_argument():
    assert [p for p in Pattern if p.causal] == [Pattern.CAUSAL_SELF]
    assert [p for p in Pattern if p.cross] == [Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS]
    assert [p for p in Pattern if p.online] == [Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS]
    assert Pattern("causal_cross") is Pattern.CAUSAL_CROSS
