"""Draws and tabulates benchmarks/results/regression_gpu.json for docs/regression.md.

The site makes the pictures when it is built. To look at them without building:
python docs/figures/regression_gpu.py FOLDER
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from regard.bench.report.plotting import colour, figure, source_of
from regard.bench.report.words import number

RESULTS = Path(__file__).parents[2] / "benchmarks/results/regression_gpu.json"
CAPTIONS = {
    "training": "Mean squared error on fresh streams while training (left), and of the trained "
    "models by position in the stream (right); three seeds each.",
    "untrained": "Error over that of local linear attention against the dimension, untrained.",
}
SMOOTHED = 25  # steps of one point of a loss curve


def tables(result: dict[str, Any]) -> str:
    """What was learnt, and the errors of untrained predictors."""
    setting, plan = result["setting"], result["plan"]
    where = result["machine"].get("gpu") or result["machine"].get("processor")
    minutes = sum(found["seconds"] for found in result["trained"].values()) / 60
    lines = [
        f"{where}, {result['date']}: {plan['steps']} steps of {setting['batch']} streams of "
        f"{setting['length']} pairs, a new map every {setting['segment']}; "
        f"{setting['layers']} layers, {setting['heads']} heads, width {setting['width']}; "
        f"{number(minutes)} minutes in all.\n",
        "| mechanism | mean | by segment | last 8 positions | per seed | ms per step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in result["trained"].items():
        scores = found["evaluation"]
        keys = [key for key in scores[0] if key.startswith("error/segment=")]
        segments = ", ".join(f"{_mean(scores, key):.3f}" for key in keys)
        seeds = ", ".join(f"{score['error']:.4f}" for score in scores)
        cells = [name.replace("_", " "), f"{_mean(scores, 'error'):.4f}", segments]
        cells += [f"{_mean(scores, 'error/end'):.4f}", seeds]
        cells.append(number(1e3 * found["seconds"] / found["steps"]))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", order(result), "", "Nothing trained, streams of "]
    lines[-1] += (
        f"{setting['untrained_length']} pairs, a new map every {setting['untrained_segment']}; "
        "mean squared error over mean squared target, in brackets over that of local linear:\n"
    )
    names = list(next(iter(result["untrained"].values())))
    lines += ["| inputs, d | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    for at, scores in result["untrained"].items():
        cells = [f"{number(s['error'])} ({s['ratio']:.2f})" for s in scores.values()]
        lines.append(f"| {at} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def order(result: dict[str, Any]) -> str:
    """Whether the published order came out, and by how much."""
    means = {name: _mean(found["evaluation"], "error") for name, found in result["trained"].items()}
    ours = means["local_linear"]
    words = []
    for name, mean in means.items():
        if name == "local_linear":
            continue
        spread = [
            one["error"] < other["error"]
            for one, other in zip(
                result["trained"]["local_linear"]["evaluation"],
                result["trained"][name]["evaluation"],
                strict=True,
            )
        ]
        less = "less" if ours < mean else "more"
        part = abs(1 - ours / mean)
        words.append(
            f"local linear has {100 * part:.0f} % {less} error than {name} "
            f"(better on {sum(spread)} of {len(spread)} seeds)"
        )
    came = all(ours < mean for name, mean in means.items() if name != "local_linear")
    verdict = "came out" if came else "did not come out"
    return f"The published order, local linear first, {verdict}: {'; '.join(words)}."


def draw(result: dict[str, Any]) -> dict[str, bytes]:
    """SVG by name."""
    return {"training": _training(result), "untrained": _untrained(result)}


def _training(result: dict[str, Any]) -> bytes:
    names = list(result["trained"])
    with figure(3.2, 1, 2) as (drawing, axes):
        left, right = axes[0]
        for name, found in result["trained"].items():
            style = {"color": colour(name, names), "linewidth": 1.0}
            for seed, losses in enumerate(found["losses"]):
                width = max(1, min(SMOOTHED, len(losses) // 4))
                count = len(losses) // width
                points = [sum(losses[i * width : (i + 1) * width]) / width for i in range(count)]
                label = name.replace("_", " ") if seed == 0 else None
                left.plot([(i + 1) * width for i in range(count)], points, label=label, **style)
            for score in found["evaluation"]:
                right.plot(score["by_position"], **style)
        left.set_title("mean squared error, training", fontsize=10)
        left.set_xlabel("step")
        right.set_title("trained, by position", fontsize=10)
        right.set_xlabel("position")
        left.set_yscale("log")
        right.set_yscale("log")
        drawing.legend(loc="outside upper center", ncols=3, fontsize=9)
        return _bytes(source_of(drawing))


def _untrained(result: dict[str, Any]) -> bytes:
    dims = result["setting"]["untrained_dims"]
    modes = list(dict.fromkeys(at.split()[0] for at in result["untrained"]))
    names = list(next(iter(result["untrained"].values())))
    with figure(3.2, 1, len(modes)) as (drawing, axes):
        for plot, mode in zip(axes[0], modes, strict=True):
            for name in names:
                ratios = [result["untrained"][f"{mode} {d}"][name]["ratio"] for d in dims]
                label = name if mode == modes[0] else None
                shade = colour(name.replace(" ", "_"), [n.replace(" ", "_") for n in names])
                plot.plot(dims, ratios, marker="o", markersize=3, label=label, color=shade)
            plot.set_title(f"error over local linear's, {mode}", fontsize=10)
            plot.set_xlabel("d")
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            plot.set_xticks(dims, [str(d) for d in dims])
        drawing.legend(loc="outside upper center", ncols=3, fontsize=9)
        return _bytes(source_of(drawing))


def _mean(scores: list[dict[str, Any]], key: str) -> float:
    return sum(score[key] for score in scores) / len(scores)


def _bytes(source: str) -> bytes:
    return base64.b64decode(source.split(",", 1)[1])


def main() -> None:
    """Writes the pictures into a folder."""
    folder = Path(sys.argv[1])
    for name, content in draw(json.loads(RESULTS.read_text())).items():
        (folder / f"regression_gpu_{name}.svg").write_bytes(content)


if __name__ == "__main__":
    main()
