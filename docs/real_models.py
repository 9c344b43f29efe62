"""Fills docs/real_models.md from benchmarks/results/real_speech.json and real_sentences.json.

`{{ real speech }}` is what cross-attention tells in Whisper, `{{ real sentences }}` what sinks are
in MiniLM and what calibrating them does. Where there is no file yet the page says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
NOT_YET = "*Not measured yet in this version.*\n"
SALIENCIES = {
    "encoder_output": "encoder's output, hidden",
    "input_zero": "spectrogram, hidden by 0",
    "input_minimum": "spectrogram, hidden by silence",
    "gradient": "spectrogram, gradient",
    "input_x_gradient": "spectrogram, input × gradient",
}


def filled(markdown: str) -> str:
    """The page with its placeholders replaced."""
    for placeholder, name, make in (
        ("{{ real speech }}", "real_speech", speech),
        ("{{ real sentences }}", "real_sentences", sentences),
    ):
        if placeholder in markdown:
            path = RESULTS / f"{name}.json"
            made = make(json.loads(path.read_text())) if path.exists() else NOT_YET
            markdown = markdown.replace(placeholder, made)
    return markdown


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def speech(found: dict[str, Any]) -> str:
    """Transcripts, word times, correlations, deletion."""
    told = found["summary"]
    heads = ["sentence", "seconds", "tokens", "word error, %", "heard"]
    rows = [
        [
            s["name"], f"{s['seconds']:.1f}", str(s["tokens"]), f"{s['word_error_rate']:.0f}",
            s["hypothesis"].strip(),
        ]
        for s in found["sentences"]
    ]  # fmt: skip
    at = told["alignment"]
    parts = [_table(heads, rows)]
    parts.append(
        f"**Word times** of the published alignment heads: {at['matched']} of {at['words']} words "
        "were heard right. Their starts are "
        f"off by {1000 * at['median_start_error']:.0f} ms in the "
        f"median ({1000 * at['mean_start_error']:.0f} ms on average); "
        f"{100 * at['within_0.1_s']:.0f} % are within 0.1 s, "
        f"{100 * at['within_0.2_s']:.0f} % within 0.2 s; "
        f"{100 * at['overlap']:.0f} % overlap the true word.\n"
    )
    heads = ["saliency of", "all heads", "Spearman", "alignment heads", "best head", "median head"]
    heads += ["layers 0 ... 3", "ceiling", "all / ceiling"]
    rows = []
    for name, words in SALIENCIES.items():
        row = told["agreement"][name]
        ceiling = row.get("ceiling")
        layers = " ".join(_two(value) for value in row["layer"])
        corrected = row["all"] / ceiling if ceiling else None
        cells = [row[key] for key in ("all", "spearman", "alignment_heads")]
        cells += [row["best_head"], row["median_head"]]
        rows.append([words, *map(_two, cells), layers, _two(ceiling), _two(corrected)])
    parts.append(
        f"**Correlation** (Pearson, over all tokens of a sentence, mean of the sentences); "
        f"{found['runs']} runs with hidden input, {4 * found['runs']} with hidden encoder output:\n"
    )
    parts.append(_table(heads, rows))
    area = told["deletion_area"]
    parts.append(
        "**Deletion**: mean word error rate while 0 to 100 % of the spectrogram are deleted, the "
        f"most important first (higher is more faithful): attention {area['attention']:.1f}, "
        f"saliency {area['input_zero']:.1f}, chance {area['chance']:.1f}.\n"
    )
    return "\n".join(parts)


def sentences(found: dict[str, Any]) -> str:
    """Where attention goes, and similarity under calibration."""
    share = found["tokens"]
    rows = [[kind, *map(_two, values)] for kind, values in share.items()]
    parts = [_table(["attention received", *(f"layer {i}" for i in range(6))], rows)]
    names = ("same", "other", "margin", "area", "first")
    rows = [[beta, *(_two(told[name]) for name in names)] for beta, told in found["curve"].items()]
    heads = ["beta", "same meaning", "other", "margin", "ROC area", "partner first"]
    parts.append("All sinks of all heads, calibrated:\n")
    parts.append(_table(heads, rows))
    rows = []
    for name, told in found["held_out"].items():
        count = sum(map(len, told["heads"].values()))
        cells = [name, str(count)]
        for part in ("chosen_on", "held_out"):
            before, after = told[part]["before"]["margin"], told[part]["after"]["margin"]
            cells.append(f"{before:.3f} → {after:.3f}")
        rows.append(cells)
    heads = ["heads chosen on", "heads", "margin there", "margin on the other half"]
    parts.append(
        "Only heads whose calibration alone (beta 0.4) widens the margin on half the pairs:\n"
    )
    parts.append(_table(heads, rows))
    return "\n".join(parts)
