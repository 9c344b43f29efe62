"""Fills docs/vit_analytics.md and a section of docs/real_models.md from vit_importance.json.

`{{ vit curves }}` is accuracy as heads are taken out, `{{ vit speed }}` what kept prefixes save,
`{{ vit speed cuda }}` the same on a GPU, `{{ vit many }}` the time of 144 heads on 64 images,
`{{ vit layers }}` the layers' strength, `{{ vit patterns }}` the clusters of maps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.bench.report.words import markdown_table

RESULT = Path(__file__).parent.parent / "benchmarks/results/vit_importance.json"
RESULT_CUDA = RESULT.with_name("vit_importance_cuda.json")


def filled(markdown: str) -> str:
    """The page with its placeholders replaced."""
    for name, make in (
        ("curves", curves),
        ("speed", speed),
        ("speed cuda", lambda _: speed(json.loads(RESULT_CUDA.read_text()))),
        ("many", many),
        ("layers", layers),
        ("patterns", patterns),
    ):
        placeholder = f"{{{{ vit {name} }}}}"
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, make(json.loads(RESULT.read_text())))
    return markdown


def curves(found: dict[str, Any]) -> str:
    """Accuracy after the first heads of an order were taken out, in percent."""
    heads = ["heads taken out", *map(str, found["removed"]), "mean over the curve"]
    rows = [
        [name, *(f"{100 * value:.0f}" for value in values), f"{100 * found['areas'][name]:.0f}"]
        for name, values in found["curves"].items()
    ]
    names = list(found["importance"])
    tau = found["agreement"]

    def between(first: str, second: str) -> str:
        return f"{tau[names.index(first)][names.index(second)]:.2f}"

    low, high = found["interval"]["loss_increase"]
    clear = sum(end > 0 for row in low for end in row)
    harmful = sum(end < 0 for row in high for end in row)
    return (
        f"Accuracy in percent on {found['curve_images']} of the {found['images']} images:\n\n"
        + markdown_table(heads, rows)
        + f"\nOf {sum(map(len, low))} heads, taken out alone, {clear} raise the loss by more than "
        "chance (the 95 % bootstrap interval over images lies above 0) and "
        f"{harmful} lower it (below 0). Metrics agree within families and less across them: "
        "Kendall's tau is "
        f"{between('cls_cosine_distance', 'cls_l2')} between the two distances of the class token, "
        f"{between('abs_prob_change', 'jsd')} between two sizes of a change of probabilities, "
        f"{between('prob_drop', 'loss_increase')} between the drop of the right class and the "
        f"loss, and {between('grad_sensitivity', 'loss_increase')} between the gradient at the "
        "gate and the loss that pruning really costs. All ten metrics of all heads took "
        f"{found['importance_cpu_s']:.0f} s of one CPU core.\n"
    )


def speed(found: dict[str, Any]) -> str:
    """Seconds of the naive loop and of kept prefixes."""
    heads = ["model and batch", "whole forward per head, s", "layers before kept, s"]
    heads += ["by default, s", "faster with layers kept", "faster by default"]
    rows = [
        [
            name.replace(", 1 images", ", 1 image"),
            *(f"{told[key]:.2f}" for key in ("naive_s", "prefix_s", "prefix_and_copies_s")),
            f"{told['faster_by_prefix']:.1f}×",
            f"{told['faster']:.1f}×",
        ]
        for name, told in found["speed"].items()
    ]
    return markdown_table(heads, rows)


def many(found: dict[str, Any]) -> str:
    """Seconds for every head of a model with 144 of them."""
    told, cuda = found["many"], json.loads(RESULT_CUDA.read_text())
    return (
        f"All ten metrics of {told['heads']} heads on {told['images']} images, of a model of "
        "ViT-S/14's sizes with 12 heads in each of its 12 layers and random weights, took "
        f"{told['seconds']:.0f} s of one CPU core, and {cuda['many']['seconds']:.1f} s of an "
        f"{cuda['device']} (wall time).\n"
    )


def layers(found: dict[str, Any]) -> str:
    """Means over the heads of every layer."""
    profile = found["profile"]
    parts = ("mean_distance", "normalised_entropy", "patches_to_cls")
    heads = ["layer", "mean distance, patches", "entropy / ln T", "patches to class token"]
    rows = [
        [
            str(number),
            *(f"{sum(profile[part][number]) / len(profile[part][number]):.2f}" for part in parts),
        ]
        for number in range(len(profile["mean_distance"]))
    ]
    return markdown_table(heads, rows)


def patterns(found: dict[str, Any]) -> str:
    """The clusters, what their middle resembles, and how many maps they hold."""
    told = found["patterns"]
    total = sum(told["share"])
    order = sorted(range(len(told["share"])), key=lambda k: -told["share"][k])
    rows = [
        [
            str(number),
            told["names"][number].replace("_", " "),
            f"{told['fit'][number]:.2f}",
            f"{100 * told['share'][number] / total:.0f}",
        ]
        for number in order
    ]
    purity = [value for row in told["purity"] for value in row]
    whole = sum(value == 1 for value in purity)
    linear = told["pca_error"] < told["held_out_error"]
    return (
        markdown_table(["cluster", "its medoid resembles", "cosine", "share of maps, %"], rows)
        + f"\n{whole} of {len(purity)} heads have the same pattern on all {told['images']} images. "
        f"The silhouette of the clusters is {told['silhouette']:.2f}: patterns are more of a "
        "continuum than kinds. The mean squared error on maps that were held out is "
        f"{told['held_out_error']:.3f} for the autoencoder and {told['pca_error']:.3f} for as many "
        f"principal components: with {total} maps "
        + ("the linear projection keeps more" if linear else "the autoencoder keeps more")
        + ".\n"
    )
