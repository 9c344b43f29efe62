"""CHAIR: the authors' numbers, exactly, and captions made by hand."""

from __future__ import annotations

import json

import pytest

from golden_files import GOLDEN
from regard.steer.chair import chair

CLASSES = ["dog, puppy", "cat", "car, taxi"]


def tokens(text: str) -> list[str]:
    return text.replace(".", " . ").replace(",", " , ").split()


def singular(word: str) -> str:
    whole = word.endswith("ss") or word in ("skis", "bus")
    return word if whole or not word.endswith("s") else word[:-1]


def test_captions_of_the_authors() -> None:
    told = json.loads((GOLDEN / "imbalanced_attention_fix/chair_toy.json").read_text())
    captions = [(str(image), text) for image, text in told["captions"]]
    result = chair(
        captions, told["ground_truth"], told["synonyms"], lemmatize=singular, tokenize=tokens
    )
    assert result.overall == pytest.approx(told["overall"], abs=1e-12)
    for got, expected in zip(result.sentences, told["sentences"], strict=True):
        assert got.words == expected["words"]
        assert got.generated == expected["generated"]
        assert [list(pair) for pair in got.hallucinated] == expected["hallucinated"]
        assert got.metrics == pytest.approx(expected["metrics"], abs=1e-12)


def test_captions_by_hand() -> None:
    truth = {1: ["dog", "dog", "cat"]}
    right = chair([(1, "a puppy and a cat")], truth, CLASSES).overall
    assert (right["CHAIRs"], right["CHAIRi"], right["Recall"], right["F1"]) == (0, 0, 1, 1)
    wrong = chair([(1, "a taxi")], truth, CLASSES).overall
    assert (wrong["CHAIRs"], wrong["CHAIRi"], wrong["Recall"], wrong["F1"]) == (1, 1, 0, 0)
    assert chair([], truth, CLASSES).overall["CHAIRs"] == 0
    with pytest.raises(ValueError, match="nothing for image 2"):
        chair([(2, "a dog")], truth, CLASSES)
    with pytest.raises(ValueError, match="names no class"):
        chair([(1, "a dog")], truth, [", puppy"])
