"""Which mechanism goes into which family of models, and how far softmax swapped in is from eager.

Run: python benchmarks/swap_matrix.py      (half a minute; fills the tables of docs/adapt.md)
The models are the tiny ones of the tests, with random weights; needs the extra `hf`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/adapt.md"

FAMILIES = {
    "bert": "BERT", "albert": "ALBERT", "Llama": "Llama (grouped)", "Qwen2": "Qwen2 (grouped)",
    "Mistral": "Mistral (windows)", "Gemma2": "Gemma 2 (windows, softcap)",
    "GptOss": "GPT-OSS (windows, sinks)", "whisper": "Whisper", "t5": "T5 (biases)",
    "ViT": "ViT", "Dinov2": "DINOv2", "llava": "Llava",
}  # fmt: skip
SIDES = ("none", "left", "right")
CACHED = ("Llama", "Qwen2", "Mistral", "Gemma2", "GptOss", "whisper", "llava")
COLUMNS = {
    "BERT, ViT, DINOv2": ("bert", 0), "Llama, Qwen2": ("Llama", 0), "Mistral": ("Mistral", 0),
    "Gemma 2": ("Gemma2", 0), "GPT-OSS": ("GptOss", 1), "Whisper, cross": ("whisper", 3),
    "T5, encoder": ("t5", 0),
}  # fmt: skip


def differences() -> str:
    """The largest difference of real tokens' outputs from the eager model, by the op itself."""
    from adapt.transformers.models_and_inputs import case, output
    from adapt.transformers.test_swap import decode, stepwise
    from regard.adapt import transformers as adapt
    from regard.adapt.transformers import short

    short.MOST_SCORES = 0  # or calls as short as these would be the eager model's own
    lines = [
        "| family | largest output | no padding | left | right | cached steps | three beams |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, name in FAMILIES.items():
        cells, cached = [], 0.0
        for side in SIDES:
            model, inputs = case(kind, side)
            before = output(model, inputs)
            steps = stepwise(model, inputs) if kind in CACHED else None
            given = {n: x for n, x in inputs.items() if not n.startswith("decoder")}
            beams = decode(model, given, num_beams=3) if kind in CACHED and side == "left" else None
            adapt.swap(model, "softmax")
            largest = float(before.abs().max())
            cells.append(float((output(model, inputs) - before).abs().max()))
            if steps is not None:
                cached = max(cached, float((stepwise(model, inputs) - steps).abs().max()))
            if beams is not None:
                same = beams.equal(decode(model, given, num_beams=3))
        if kind in ("ViT", "Dinov2"):  # images are not padded
            shown = [_short(cells[0]), "", ""]
        else:
            shown = [_short(cell) for cell in cells]
        more = [_short(cached), "equal" if same else "differ"] if kind in CACHED else ["", ""]
        lines.append(f"| {name} | {largest:.1f} | {' | '.join([*shown, *more])} |")
    return "\n".join(lines)


def mechanisms() -> str:
    """Every mechanism in a layer of every kind."""
    from adapt.transformers.models_and_inputs import case
    from regard.adapt.fitting import CARDS
    from regard.adapt.transformers import sites

    layers = {c: sites(case(kind, "none")[0])[number] for c, (kind, number) in COLUMNS.items()}
    lines = [
        f"| mechanism | {' | '.join(COLUMNS)} |",
        "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    for name, card in CARDS.items():
        cells = [_word(card, site) for site in layers.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _word(card: Any, site: Any) -> str:
    """Whether a layer can take a mechanism, or with what dropped."""
    from regard.adapt.fitting import refuses

    dropped: list[str] = []
    while (reason := refuses(card, site, dropped)) is not None and "drop=" in reason:
        dropped.append(reason.split("drop='")[1].split("'")[0])
    if reason is not None:
        return "a plan" if "plan" in reason else "pattern" if "serves" in reason else "no"
    return " ".join(["drop", *(f"`{name}`" for name in dropped)]) if dropped else "yes"


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def main() -> None:
    from upgrade import fill

    tables = {"families": differences(), "mechanisms": mechanisms()}
    PAGE.write_text(fill(PAGE.read_text(), tables))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))  # the tiny models
    main()
