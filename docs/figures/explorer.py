"""Makes what the picture of the linked views in docs/vit_analytics.md shows: a model and pictures.

Run: REGARD_RESOURCES=FOLDER python docs/figures/explorer.py WHERE
(a minute; FOLDER holds the archives that regard.testing.resources names)

WHERE/model is ViT-S/14 with a linear classifier, fitted to crops of the left halves of twelve
pictures; WHERE/crops/PICTURE/ holds crops of the right halves.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from regard.testing import resources

EACH = 2  # crops of every picture that are looked at
BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/vit_importance.py"))


def described(backbone: nn.Module, images: Tensor) -> Tensor:
    """What transformers' classifier reads: the class token and the mean of the patches."""
    with torch.no_grad():
        parts = [backbone(batch).last_hidden_state for batch in images.split(16)]
    return torch.cat([torch.cat([part[:, 0], part[:, 1:].mean(1)], -1) for part in parts])


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    folder = Path(sys.argv[1])
    backbone, pixels = resources.vit_small()
    names = BENCHMARK["PICTURES"]
    images, labels = BENCHMARK["crops"](pixels, 0, 8, 0)
    config = backbone.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in config.id2label.items()}
    model = transformers.Dinov2ForImageClassification(config).eval()
    model.dinov2.load_state_dict(backbone.state_dict())
    tokens = described(backbone, images)
    optimiser = torch.optim.LBFGS(
        model.classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model.classifier(tokens), labels)
        (loss := loss + 1e-3 * model.classifier.weight.square().sum()).backward()
        return loss

    optimiser.step(closure)
    model.save_pretrained(folder / "model")
    transformers.ViTImageProcessor(
        size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder / "model")
    kept: list[np.ndarray] = []

    def keep(found: list[np.ndarray]) -> Tensor:
        kept.extend(found)
        return torch.empty(0)

    _, labels = BENCHMARK["crops"](keep, 1, EACH, 1)
    for number, (crop, label) in enumerate(zip(kept, labels.tolist(), strict=True)):
        inside = folder / "crops" / names[label]
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(inside / f"{names[label]}_{number % EACH}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
