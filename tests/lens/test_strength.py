"""Spatial strength profiles: golden numbers, identities, and heads planted in a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lens.timm_like import VisionTransformer
from lens.tiny_vit import golden_model, golden_numbers
from regard.lens.strength import (
    StrengthAccumulator,
    distances,
    strength_of_model,
    strength_profile,
)
from regard.lens.tap import tap
from regard.lens.templates import template_scores, templates


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    return golden_numbers()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return golden_model()


def random_weights(*shape: int, sharpness: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def test_golden_profile(model: nn.Module, golden: dict[str, dict[str, Tensor]]) -> None:
    images = golden["in"]["images"]
    found = strength_of_model(model, images, 4)
    names = [key.removeprefix("profile.") for key in golden["out"] if key.startswith("profile.")]
    assert len(names) == 8
    for name in names:
        wanted = golden["out"][f"profile.{name}"].numpy()
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=2e-3, atol=5e-5)
    first: dict[int, Tensor] = {}
    with tap(model, read=lambda a: first.update({a.layer: a.weights[0]})), torch.no_grad():
        model(images)
    wanted = golden["out"]["attention_image0"]
    torch.testing.assert_close(torch.stack(list(first.values())), wanted, rtol=2e-3, atol=5e-5)
    split = strength_of_model(model, images.split(5), 4)
    for name in (*names, "offsets", "content_dependence"):
        np.testing.assert_allclose(getattr(split, name), getattr(found, name), atol=1e-6)


@pytest.mark.parametrize("hops", ["chebyshev", "manhattan"])
@pytest.mark.parametrize(("grid", "prefix"), [((3, 5), 1), ((4, 4), 0), ((2, 3), 5)])
def test_masses_sum_to_one(grid: tuple[int, int], prefix: int, hops: Any) -> None:
    tokens = grid[0] * grid[1] + prefix
    found = strength_profile(random_weights(3, 2, 2, tokens, tokens), grid, prefix, hops=hops)
    whole = found.strength_mass_k.sum(-1) + found.patches_to_prefix
    np.testing.assert_allclose(whole, 1, atol=1e-12)
    np.testing.assert_allclose(found.strength_mass_k_patchnorm.sum(-1), 1, atol=1e-12)
    longest = sum(grid) - 2 if hops == "manhattan" else max(grid) - 1
    assert found.strength_mass_k.shape == (2, 2, longest + 1)
    if prefix == 1:
        np.testing.assert_array_equal(found.patches_to_cls, found.patches_to_prefix)
    assert np.isnan(found.cls_to_cls).all() == (prefix == 0)


def test_a_loop_says_the_same() -> None:
    """Means over pairs, directions and distances, written out."""
    rows, columns, prefix = 3, 4, 2
    tokens = rows * columns + prefix
    weights = random_weights(2, 1, 1, tokens, tokens)
    found = strength_profile(weights, (rows, columns), prefix)
    pairs: dict[int, list[float]] = {}
    steps: dict[tuple[int, int], list[float]] = {}
    far = 0.0
    for image in weights[:, 0, 0]:
        for i in range(rows * columns):
            row = image[prefix + i, prefix:]
            for j in range(rows * columns):
                down, right = j // columns - i // columns, j % columns - i % columns
                value = float(row[j])
                pairs.setdefault(max(abs(down), abs(right)), []).append(value)
                steps.setdefault((down, right), []).append(value)
                far += value / float(row.sum()) * math.hypot(down, right)
    for k, values in pairs.items():
        assert found.strength_mean_k[0, 0, k] == pytest.approx(np.mean(values))
    for (down, right), values in steps.items():
        centre = found.offsets[0, 0, down + rows - 1, right + columns - 1]
        assert centre == pytest.approx(np.mean(values))
    distance = far / 2 / (rows * columns)
    assert found.mean_attention_distance_patches[0, 0] == pytest.approx(distance)


def test_uniform_and_identity() -> None:
    uniform = strength_profile(torch.full((2, 1, 1, 17, 17), 1 / 17), 4)
    np.testing.assert_allclose(uniform.strength_mean_k, 1 / 17, rtol=1e-6)
    np.testing.assert_allclose(uniform.entropy_nats, math.log(17), rtol=1e-6)
    np.testing.assert_allclose(uniform.normalised_entropy(), 1, rtol=1e-6)
    mean = float(distances((4, 4))[1].mean())
    np.testing.assert_allclose(uniform.mean_attention_distance_patches, mean, rtol=1e-6)
    np.testing.assert_allclose(uniform.content_dependence, 0, atol=1e-6)
    identity = strength_profile(torch.eye(17).expand(1, 1, 1, 17, 17), 4)
    np.testing.assert_allclose(identity.strength_mass_k[0, 0], [1, 0, 0, 0])
    assert identity.mean_attention_distance_patches[0, 0] == 0
    assert identity.entropy_nats[0, 0] == 0
    assert np.isnan(identity.content_dependence).all(), "one image does not vary"


def test_content_dependence() -> None:
    weights = random_weights(50, 1, 1, 10, 10)
    found = strength_profile(weights, 3)
    spread = weights.std(0, correction=0) / weights.mean(0)
    np.testing.assert_allclose(found.content_dependence[0, 0], spread.mean(), rtol=1e-9)


def planted() -> nn.Module:
    """One layer of four heads: previous column, ring 2, the class token, and everything.

    Positions are one-hot. Queries are rows of a template and keys positions, both after undoing
    what LayerNorm does to a one-hot vector: subtract 1/C, divide by its deviation.
    """
    side, heads = 5, 4
    tokens = side * side + 1
    width = heads * tokens
    options: dict[str, Any] = {"img_size": 20, "patch_size": 4, "num_classes": 3}
    vit = VisionTransformer(embed_dim=width, depth=1, num_heads=heads, mlp_ratio=0.1, **options)
    known = templates((side, side), 1)
    names = ("previous_column", "ring_2", "cls_sink", "uniform")
    spread = math.sqrt((1 - 1 / width) / width + 1e-6)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        vit.pos_embed[0, :, :tokens] = torch.eye(tokens)
        block = vit.blocks[0]
        block.norm1.weight.fill_(spread)  # type: ignore[operator]
        block.norm1.bias.fill_(1 / width)  # type: ignore[operator]
        for number, name in enumerate(names):
            scores = 40 * math.sqrt(tokens) * known[name] * (name != "uniform")
            place = slice(number * tokens, (number + 1) * tokens)
            block.attn.qkv.weight[place, :tokens] = scores.T
            keys = slice(width + number * tokens, width + (number + 1) * tokens)
            block.attn.qkv.weight[keys, :tokens] = torch.eye(tokens)
    return vit.eval()


def test_planted_heads_are_recovered() -> None:
    seen: list[Tensor] = []
    images = torch.randn(2, 3, 20, 20)
    model = planted()
    with tap(model, read=lambda a: seen.append(a.weights)), torch.no_grad():
        model(images)
    scores = template_scores(seen[0], 5, 1)
    for image in scores.best():
        assert image.tolist() == ["previous_column", "ring_2", "cls_sink", "uniform"]
    found = strength_of_model(model, images, 5)
    masses = found.strength_mass_k_patchnorm[0]
    assert masses[1, 2] == pytest.approx(1, abs=0.05)  # the patch in the centre has a whole ring
    assert found.patches_to_cls[0, 2] == pytest.approx(1, abs=1e-5)
    assert found.offsets[0, 0, 4, 3] == pytest.approx(1, abs=1e-5)  # one column to the left
    np.testing.assert_allclose(found.strength_mean_k[0, 3], 1 / 26, rtol=1e-5)


def test_templates() -> None:
    made = templates((2, 3), 1, foreground=torch.tensor([0, 1, 0, 0, 0, 0]).bool())
    assert "ring_3" not in made, "there is none on so small a grid"
    for name, part in made.items():
        assert part.shape == (7, 7), name
        assert part[0].sum() == 0, name
    assert made["row_below"][1, 4] == 1
    assert made["same_row"][5].tolist() == [0, 0, 0, 0, 1, 0, 1]
    for name in set(made) - {"foreground"}:
        rows = made[name] / made[name].sum(-1, keepdim=True).clamp_min(1)
        scores = template_scores(rows, (2, 3))
        place = scores.names.index(name)
        assert scores.cosine[place] == pytest.approx(1), name
        assert scores.mass[place] == pytest.approx(1), name
    sink = torch.zeros(7, 7)
    sink[:, 4] = 1
    assert str(template_scores(sink, (2, 3)).best()) == "single_token_sink"


def test_memory_does_not_grow_with_images() -> None:
    """What is kept after a thousand images is what was kept after one."""

    def size(sums: StrengthAccumulator) -> int:
        kept = 0
        for part in sums._layers.values():
            tensors = [v for v in vars(part).values() if isinstance(v, Tensor)]
            kept += sum(v.nbytes for v in (*tensors, *part.totals.values()))
        return kept

    sums = StrengthAccumulator(2)
    weights = random_weights(1, 1, 5, 5)
    sums.add(0, weights)
    first = size(sums)
    for _ in range(999):
        sums.add(0, weights)
    assert size(sums) == first
    assert sums.profile().images == 1000


def test_files(tmp_path: Path) -> None:
    found = strength_profile(random_weights(2, 2, 3, 10, 10), 3)
    found.picture(tmp_path / "profile.svg")
    assert "<svg" in (tmp_path / "profile.svg").read_text()
    assert len(json.loads(found.to_json())["strength_mean_k"]) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_wrong_arguments() -> None:
    weights = random_weights(1, 1, 1, 10, 10)
    with pytest.raises(ValueError, match=r"weights must be \[B, H, 17, 17\] \(grid 4 x 4, 1"):
        strength_profile(weights, 4)
    with pytest.raises(ValueError, match=r"weights must be \[N, L, H, T, T\]"):
        strength_profile(weights[0], 3)
    with pytest.raises(ValueError, match="hops must be one of"):
        strength_profile(weights, 3, hops="euclid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix at least 0"):
        strength_profile(weights, 3, -1)
    with pytest.raises(ValueError, match="every layer needs the same images"):
        StrengthAccumulator(3).profile()
    with pytest.raises(ValueError, match="foreground must be one bool per patch"):
        template_scores(weights, 3, 1, torch.ones(4).bool())
    with pytest.raises(ValueError, match="template_scores: weights must be"):
        template_scores(weights, 4)
