"""Fills docs/real_models.md and docs/cross_attention.md from results of the benchmarks.

`{{ real speech }}` is what cross-attention tells in Whisper, `{{ real sentences }}` what sinks are
in MiniLM and what calibrating them does, `{{ copy alignment }}` what a small model of known
alignment shows. Where there is no file yet the page says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.bench.report.words import markdown_table

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
        ("{{ copy alignment }}", "copy_alignment", copying),
    ):
        if placeholder in markdown:
            path = RESULTS / f"{name}.json"
            made = make(json.loads(path.read_text())) if path.exists() else NOT_YET
            markdown = markdown.replace(placeholder, made)
    return markdown


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
    parts = [markdown_table(heads, rows)]
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
    parts.append(markdown_table(heads, rows))
    pooled = [s["input_zero"]["mean_pooling"] for s in found["sentences"]]
    parts.append(
        f"Pooled by the mean instead of the maximum, {SALIENCIES['input_zero']}: "
        f"{sum(pooled) / len(pooled):.2f} for all heads.\n"
    )
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
    parts = [markdown_table(["attention received", *(f"layer {i}" for i in range(6))], rows)]
    channels = " and ".join(map(str, found["dimensions"])) or "none"
    sizes = found["largest"]
    parts.append(
        f"Channels that mark the sink (`sink_dimensions`): {channels}; the largest activation of a "
        f"layer's input is {min(sizes):.0f} to {max(sizes):.0f} times the rms of its token.\n"
    )
    names = ("same", "other", "margin", "area", "first")
    rows = [[beta, *(_two(told[name]) for name in names)] for beta, told in found["curve"].items()]
    heads = ["beta", "same meaning", "other", "margin", "ROC area", "partner first"]
    parts.append("All sinks of all heads, calibrated:\n")
    parts.append(markdown_table(heads, rows))
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
    parts.append(markdown_table(heads, rows))
    return "\n".join(parts)


def copying(found: dict[str, Any]) -> str:
    """Agreement, and where mass lies, as means over the trained models and their ranges."""
    models = found["models"]

    def over(*path: str) -> str:
        values = list(models)
        for key in path:
            values = [value[key] for value in values]
        mean = sum(values) / len(values)
        return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"

    columns = ("all", "best_head", "median_head", "value_weighted", "ceiling")
    heads = ["saliency of", "all heads", "best head", "median head", "value-weighted", "ceiling"]
    names = {"encoder_output": "encoder's output, hidden", "input": "spectrogram, hidden"}
    rows = [
        [words, *(over("agreement", name, column) for column in columns)]
        for name, words in names.items()
    ]
    places = {
        "attention": "attention", "value_weighted": "value-weighted attention",
        "encoder_output": "saliency of the encoder's output",
        "input": "saliency of the spectrogram", "chance": "chance",
    }  # fmt: skip
    shares = [[words, over("on_the_sound", name)] for name, words in places.items()]
    right = 100 * sum(model["right"] for model in models) / len(models)
    return "\n".join(
        (
            f"Correlation (Pearson), mean and range of {len(models)} models that write {right:.1f} "
            f"% of the sounds right, {found['sequences']} sequences each, {found['runs']} runs "
            "with hidden parts:\n",
            markdown_table(heads, rows),
            "Share of a token's mass (of a saliency: above its median) on frames of its sound:\n",
            markdown_table(["map", "on its sound"], shares),
        )
    )
