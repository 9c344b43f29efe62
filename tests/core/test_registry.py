"""The lazy mapping of mechanisms: folders, entry points, and everything wrong with them."""

from __future__ import annotations

import sys

import pytest

from regard.core.card import Card
from regard.core.registry import GROUP, Mechanisms, UnknownMechanism

CARD = """
from regard.core.card import Card, Paper
def op(q, k, v): "One line."
card = Card({name!r}, Paper("Toy"), op, op)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path that forgets what was imported from it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0].startswith(("toys", "other")):
            del sys.modules[name]


def folder(site, name, text):
    place = site / "toys_ops" / name
    place.mkdir(parents=True)
    (site / "toys_ops" / "__init__.py").touch()
    (place / "__init__.py").touch()
    if text is not None:
        (place / "card.py").write_text(text)


def plugin(site, distribution, name, value):
    place = site / f"{distribution}-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")


def test_listing_imports_nothing_and_asking_imports_one(site):
    for name in ("beta", "alpha"):
        folder(site, name, CARD.format(name=name))
    folder(site, "engine", None)
    toys = Mechanisms("toys_ops")
    assert list(toys) == ["alpha", "beta"]
    assert len(toys) == 2
    assert "alpha" in toys
    assert "engine" not in toys
    assert repr(toys) == "Mechanisms(alpha, beta)"
    assert not [name for name in sys.modules if name.startswith("toys_ops")]
    card = toys["alpha"]
    assert isinstance(card, Card)
    assert card.name == "alpha"
    assert toys["alpha"] is card
    assert "toys_ops.alpha.card" in sys.modules
    assert "toys_ops.beta.card" not in sys.modules


def test_an_unknown_name_is_answered_with_the_nearest(site):
    folder(site, "softmax", CARD.format(name="softmax"))
    toys = Mechanisms("toys_ops")
    with pytest.raises(UnknownMechanism) as caught:
        toys["sofmax"]
    assert str(caught.value) == (
        "no mechanism is called 'sofmax'; did you mean 'softmax'? (known: softmax)"
    )
    assert isinstance(caught.value, KeyError)
    assert toys.get("sofmax") is None
    with pytest.raises(UnknownMechanism, match="called 3 "):
        toys[3]


def test_an_installed_package_adds_a_mechanism(site):
    folder(site, "alpha", CARD.format(name="alpha"))
    (site / "other.py").write_text(CARD.format(name="gamma"))
    plugin(site, "other", "gamma", "other:card")
    toys = Mechanisms("toys_ops")
    assert list(toys) == ["alpha", "gamma"]
    assert "other" not in sys.modules
    assert toys["gamma"].name == "gamma"
    assert {card.name for card in toys.values()} == {"alpha", "gamma"}


def test_two_of_one_name_raise_when_asked_for_and_hide_no_other(site):
    folder(site, "alpha", CARD.format(name="alpha"))
    folder(site, "beta", CARD.format(name="beta"))
    (site / "other.py").write_text(CARD.format(name="alpha"))
    plugin(site, "other", "alpha", "other:card")
    toys = Mechanisms("toys_ops")
    assert list(toys) == ["alpha", "beta"]
    assert toys["beta"].name == "beta"
    text = "several mechanisms are called 'alpha': toys_ops.alpha.card:card, other:card"
    with pytest.raises(ValueError, match=text):
        toys["alpha"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("card = 'softmax'", "must be a Card, got 'softmax'"), (CARD.format(name="beta"), "'beta'")],
)
def test_what_is_not_a_card_of_that_name_is_refused(site, text, found):
    folder(site, "alpha", text)
    with pytest.raises(TypeError, match=f"mechanism 'alpha': toys_ops.alpha.card:card .*{found}"):
        Mechanisms("toys_ops")["alpha"]


def test_an_error_inside_a_folder_says_which(site):
    plugin(site, "other", "gamma", "other_that_is_missing:card")
    folder(site, "alpha", "1 / 0")
    toys = Mechanisms("toys_ops")
    with pytest.raises(ZeroDivisionError) as caught:
        toys["alpha"]
    assert caught.value.__notes__ == [
        "while loading the mechanism 'alpha' from toys_ops.alpha.card:card"
    ]
    with pytest.raises(ModuleNotFoundError) as missing:
        toys["gamma"]
    assert "'gamma' from other_that_is_missing:card" in missing.value.__notes__[0]
