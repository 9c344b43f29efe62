"""CHAIR: how often a caption names an object that is not in the image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

YOUNG_AND_OLD = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("animal", "cub"),
)
VEHICLES = ("jet", "train")
PAIRS = (
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light"),
    *("traffic signal", "stop light", "fire hydrant", "stop sign", "parking meter", "suit case"),
    *("sports ball", "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog"),
    *("cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant", "bow tie"),
    *("laptop computer", "home plate", "train track"),
)


@dataclass(frozen=True)
class CaptionObjects:
    """One caption: its words after merging, the objects it names, and those it made up.

    `hallucinated` are pairs (word, object); duplicates are kept.
    """

    words: list[str]
    generated: list[str]
    hallucinated: list[tuple[str, str]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Chair:
    """`overall` over all captions (CHAIRs, CHAIRi, Recall, Precision, F1, Len), and each one."""

    overall: dict[str, float]
    sentences: list[CaptionObjects]


def chair(
    captions: Iterable[tuple[int | str, str]],
    ground_truth: Mapping[int | str, Collection[str]],
    synonyms: Sequence[str] | Sequence[Sequence[str]],
    *,
    lemmatize: Callable[[str], str] | None = None,
    tokenize: Callable[[str], Sequence[str]] | None = None,
) -> Chair:
    """Caption hallucination by objects (Rohrbach et al., arXiv 1809.02156).

        CHAIRs = captions with a made-up object / captions
        CHAIRi = made-up mentions / all mentions,   Recall = Σ |gt ∩ named| / Σ |gt|
        Precision = Σ |gt ∩ named| / Σ |named|,     F1 of both,  Len = 0.01 mean number of words

    Args:
        captions: (image, caption) pairs.
        ground_truth: by image, the objects in it (names of classes); duplicates do not count.
        synonyms: a line per class, "person, man, woman", its first word naming the class; the
            80 lines of COCO's are public (LisaAnne/Hallucination).
        lemmatize: word -> its singular; None: leaves words as they are. (The published figures
            use WordNet's.)
        tokenize: text -> words, punctuation included; None: splits at spaces.

    Matched to the released code's numbers, words and objects exactly.
    Raises: ValueError for an image without ground truth, or a class without a name.

    >>> made = chair([(1, "a dog and a cat")], {1: ["dog"]}, ["dog, puppy", "cat"])
    >>> made.overall["CHAIRi"], made.sentences[0].hallucinated
    (0.5, [('cat', 'cat')])
    """
    table = _table(synonyms)
    pairs = _pairs()
    sentences, sizes = [], {"gt": 0, "named": 0, "both": 0, "mentions": 0, "false": 0, "words": 0}
    for image, caption in captions:
        if image not in ground_truth:
            raise ValueError(f"chair: ground_truth: has nothing for image {image!r}")
        truth = set(ground_truth[image])
        low = caption.lower()
        words = list(tokenize(low) if tokenize is not None else low.split())
        words = [lemmatize(word) for word in words] if lemmatize is not None else words
        words = _merge(words, pairs)
        # A toilet's seat is no chair.
        seat = {"toilet", "seat"} <= set(words)
        named = [word for word in words if word in table and not (seat and word == "seat")]
        objects = [table[word] for word in named]
        false = [(w, o) for w, o in zip(named, objects, strict=True) if o not in truth]
        both, distinct = len(truth & set(objects)), len(set(objects))
        sentences.append(
            CaptionObjects(words, objects, false, _one(truth, objects, false, both, distinct))
        )
        new = (len(truth), distinct, both, len(objects), len(false), len(words))
        sizes = {key: sizes[key] + add for key, add in zip(sizes, new, strict=True)}
    count = max(len(sentences), 1)
    recall, precision = _ratio(sizes["both"], sizes["gt"]), _ratio(sizes["both"], sizes["named"])
    overall = {
        "CHAIRs": sum(bool(one.hallucinated) for one in sentences) / count,
        "CHAIRi": _ratio(sizes["false"], sizes["mentions"]),
        "Recall": recall,
        "Precision": precision,
        "F1": _harmonic(recall, precision),
        "Len": 0.01 * sizes["words"] / count,
    }
    return Chair(overall, sentences)


def _one(
    truth: set[str], objects: list[str], false: list[tuple[str, str]], both: int, distinct: int
) -> dict[str, float]:
    recall, precision = _ratio(both, len(truth)), _ratio(both, distinct)
    return {
        "CHAIRs": int(bool(false)),
        "CHAIRi": _ratio(len(false), len(objects)),
        "Recall": recall,
        "Len": 0.0,  # the published measure has a length over all captions only
        "Precision": precision,
        "F1": _harmonic(recall, precision),
    }


def _table(synonyms: Sequence[str] | Sequence[Sequence[str]]) -> dict[str, str]:
    table: dict[str, str] = {}
    for line in synonyms:
        words = line.split(",") if isinstance(line, str) else line
        words = [word.strip() for word in words]
        if not words or not words[0]:
            raise ValueError(f"chair: synonyms: {line!r} names no class")
        table |= {word: words[0] for word in words if word}
    return table


def _pairs() -> dict[str, str]:
    """Two words that name one thing, and the word that they become."""
    pairs = {pair: pair for pair in PAIRS}
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in YOUNG_AND_OLD}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
    return pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


def _merge(words: list[str], pairs: dict[str, str]) -> list[str]:
    merged, at = [], 0
    while at < len(words):
        pair = " ".join(words[at : at + 2])
        step = 2 if pair in pairs and at + 1 < len(words) else 1
        merged.append(pairs[pair] if step == 2 else words[at])
        at += step
    return merged


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
