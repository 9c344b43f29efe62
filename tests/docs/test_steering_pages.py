"""The figures on the pages of steering are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def page(name: str) -> str:
    """The page on one line: its line breaks are nobody's business."""
    return " ".join((ROOT / f"docs/steering/{name}.md").read_text().split())


def test_carve() -> None:
    found, text = results("carve"), page("carve")
    for row in found["regions"]:
        way, alone = row["contrast"], row["question alone"]
        shares = [f"{100 * part['above_half']:.0f} %" for part in (way, alone)]
        cells = [f"{row['noise']:g}", f"{way['mean']:.2f}", f"{alone['mean']:.2f}", *shares]
        assert f"| {' | '.join(cells)} |" in text
    times = found["times"]
    said = f"{times['cached']:.2f} CPU seconds, against {times['anew']:.2f}"
    assert said in text
    assert f"({times['ratio']:.1f} times;" in text
    assert times["ratio"] > 3


def test_imbalanced() -> None:
    found, text = results("visual_boost"), page("imbalanced")
    tokens = list(found["tokens"].values())
    top, bottom = ([row[name] for row in tokens] for name in ("top", "bottom"))
    assert f"{min(top)} to {max(top)} local ones" in text
    shares = [100 * row["share_of_attention_on_bottom"] for row in tokens]
    said = f"{min(bottom)} to {max(bottom)} summary ones that hold {min(shares):.0f} to "
    assert f"{said}{max(shares):.0f} %" in text
    cost = found["cost"]
    assert f"{1000 * cost['plain_s']:.0f} ms" in text
    assert f"{1000 * cost['boosted_s']:.0f} ms" in text
    assert f"{100 * (cost['ratio'] - 1):.1f} % more" in text
