"""MiniLM: where its attention sinks are, and what calibrating them does to sentence similarity.

Run: REGARD_RESOURCES=FOLDER python benchmarks/real_sentences.py
(a minute on one thread; FOLDER holds the archives that regard.testing.resources names)
Writes results/real_sentences.json, from which docs/real_models.md is made, and its picture.

Pairs of sentences, sixteen that mean the same and the unrelated ones among them, are judged by the
cosine of their vectors: the area under the ROC curve, and the margin between the means of the two
groups. ACT calibrates the sinks of all heads, and of those heads that raise the margin on one half
of the pairs when each is calibrated alone, judged on the other half.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from regard.core.state import write_atomically
from regard.lens.agreement import ranks
from regard.lens.entropy import entropies
from regard.lens.records import drawing, plain
from regard.lens.sinks import sinks
from regard.steer import act_calibration
from regard.testing import resources

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
ALPHA = 3.0  # a sink gets this many times the mean attention
BETAS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
PAIRS = (
    ("A man is playing a guitar on the street.", "Somebody makes music outdoors with a guitar."),
    ("The company lost money last year.", "Last year the firm made a loss."),
    (
        "She forgot to water the plants.",
        "The plants were not watered, because she did not remember.",
    ),
    ("The train was late because of the snow.", "Snow delayed the train."),
    ("He learned to cook from his grandmother.", "His grandmother taught him cooking."),
    ("The children are building a castle of sand.", "Kids make a sandcastle."),
    ("Doctors recommend more exercise.", "Physicians advise people to move more."),
    ("The museum is closed on Mondays.", "On Mondays one cannot visit the museum."),
    ("Prices of houses rose sharply.", "Homes became much more expensive."),
    ("The dog chased the cat up a tree.", "A cat fled from a dog by climbing a tree."),
    ("I could not sleep because of the noise.", "The noise kept me awake."),
    ("The river flooded the village.", "The village was under water when the river rose."),
    ("Astronomers found a new planet.", "A planet that was unknown has been discovered."),
    ("He sold his car to a neighbour.", "The neighbour bought his car."),
    ("The meeting was moved to Friday.", "They will now meet on Friday."),
    ("Bees are important for growing fruit.", "Without bees there would be less fruit."),
)


class Judge:
    """Scores of a model on the pairs, under any context manager."""

    def __init__(self) -> None:
        self.model, self.tokenizer = resources.minilm()
        self.first, self.second = zip(*PAIRS, strict=True)

    def vectors(self, sentences: tuple[str, ...]) -> Tensor:
        batch = self.tokenizer(list(sentences), padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = self.model(**batch).last_hidden_state
        real = batch["attention_mask"][..., None]
        mean = (hidden * real).sum(1) / real.sum(1)
        return mean / mean.norm(dim=-1, keepdim=True)

    def similarities(self, context: Any = None) -> Tensor:
        """Cosines [16, 16]; the diagonal holds the pairs that mean the same."""
        with context or nullcontext():
            return self.vectors(self.first) @ self.vectors(self.second).T


def scores(similar: Tensor, chosen: slice = slice(None)) -> dict[str, float]:
    """Area under the curve, margin of means, and in how many rows the partner comes first."""
    block = similar[chosen, chosen].double()
    same = torch.eye(len(block), dtype=torch.bool)
    order = ranks(block.flatten()).reshape(block.shape)
    count = len(block)
    others = count * count - count
    area = (order[same].sum() - count * (count + 1) / 2) / (count * others)
    return {
        "area": float(area),
        "margin": float(block[same].mean() - block[~same].mean()),
        "same": float(block[same].mean()),
        "other": float(block[~same].mean()),
        "first": float((block.argmax(1) == torch.arange(count)).double().mean()),
    }


def chosen_heads(judge: Judge, part: slice, beta: float) -> tuple[dict[int, list[int]], Tensor]:
    """Heads whose calibration alone widens the margin on part of the pairs; and every gain."""
    base = scores(judge.similarities(), part)["margin"]
    gains = torch.zeros(6, 12)
    for layer in range(6):
        for head in range(12):
            context = act_calibration(
                judge.model, {layer: [head]}, beta=beta, theta=None, alpha=ALPHA, spare_first=False
            )
            gains[layer, head] = scores(judge.similarities(context), part)["margin"] - base
    kept = {layer: [head for head in range(12) if gains[layer, head] > 0] for layer in range(6)}
    return {layer: heads for layer, heads in kept.items() if heads}, gains


def main() -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if not resources.is_here("minilm"):
        print("left out: the resource 'minilm' is not here (see regard.testing.resources)")
        return 0
    judge = Judge()
    sentences = [*judge.first, *judge.second]
    batch = judge.tokenizer(sentences, padding=True, return_tensors="pt")
    found = sinks(judge.model, dict(batch), theta=None, alpha=ALPHA)
    spread = entropies(judge.model, dict(batch))
    kinds: dict[str, list[float]] = {"[CLS]": [], "[SEP]": [], ".": [], "words": []}
    for row, ids in enumerate(batch["input_ids"]):
        received = found.received[:, row].mean(1)  # [layer, token]
        shares = dict.fromkeys(kinds, np.zeros(6))
        for place, piece in enumerate(judge.tokenizer.convert_ids_to_tokens(ids.tolist())):
            kind = piece if piece in kinds else "words"
            if piece != "[PAD]":
                shares[kind] = shares[kind] + received[:, place]
        for kind, values in shares.items():
            kinds[kind].append(values)
    share = {kind: np.mean(values, 0) for kind, values in kinds.items()}
    common = {"theta": None, "alpha": ALPHA, "spare_first": False}
    curve = {
        beta: scores(judge.similarities(act_calibration(judge.model, beta=beta, **common)))
        for beta in BETAS
    }
    plain_similar, held_out = judge.similarities(), {}
    exact = torch.equal(
        plain_similar, judge.similarities(act_calibration(judge.model, beta=1.0, **common))
    )
    for name, part, other in (
        ("first half chooses", slice(0, 8), slice(8, 16)),
        ("second half chooses", slice(8, 16), slice(0, 8)),
    ):
        heads, gains = chosen_heads(judge, part, beta=0.4)
        similar = judge.similarities(act_calibration(judge.model, heads, beta=0.4, **common))
        held_out[name] = {
            "heads": heads, "gains": gains,
            "chosen_on": {"before": scores(plain_similar, part), "after": scores(similar, part)},
            "held_out": {"before": scores(plain_similar, other), "after": scores(similar, other)},
        }  # fmt: skip
    result = {
        "alpha": ALPHA, "tokens": share, "mass": found.mass, "dimensions": found.dimensions,
        "largest": np.nanmax(found.largest, (1, 2)), "entropy": spread.relative,
        "curve": curve, "beta_1_is_bit_identical": exact, "held_out": held_out,
    }  # fmt: skip
    text = json.dumps(plain(result), indent=1)
    write_atomically(RESULTS / "real_sentences.json", (text + "\n").encode())
    with drawing(FIGURES / "real_sentences.png", (11, 3.2), 1, 3) as axes:
        bottom = np.zeros(6)
        for kind, values in share.items():
            axes[0, 0].bar(range(6), values, bottom=bottom, label=kind)
            bottom = bottom + values
        axes[0, 0].set(xlabel="layer", title="attention by kind of token (sum of column means)")
        axes[0, 0].title.set_fontsize(9)
        axes[0, 0].legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        image = axes[0, 1].imshow(found.mass, vmin=0, vmax=1, aspect="auto")
        axes[0, 1].set(xlabel="head", ylabel="layer", title="share of attention on sinks")
        axes[0, 1].figure.colorbar(image, ax=axes[0, 1])
        axes[0, 2].plot(BETAS, [curve[b]["margin"] for b in BETAS], marker=".", label="margin")
        axes[0, 2].plot(BETAS, [curve[b]["area"] for b in BETAS], marker=".", label="ROC area")
        axes[0, 2].set(xlabel="beta (1: nothing changed)", title="all sinks calibrated")
        axes[0, 2].legend(fontsize=7)
    print(json.dumps(plain({"tokens": share, "curve": curve, "exact": exact}), indent=1))
    for name, told in held_out.items():
        print(name, {k: v for k, v in told.items() if k not in ("gains",)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
