"""CARVE's maps: the authors' numbers, the minimiser, and a planted question."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models as tiny
from golden_files import GOLDEN, parts
from regard.lens import contrast
from regard.lens.entropy import attention_entropy
from regard.lens.taps.station import STATIONS

transformers = tiny.transformers


IDS = torch.tensor([[1, 5, *[65] * 16, 9, 10, 11]])
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def described(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "carve" / f"{name}.json").read_text())


def test_fused_maps_of_the_authors() -> None:
    data, told = parts("carve/fuse_mask"), described("fuse_mask")
    asked, general = data["in"]["query_maps"], data["in"]["general_maps"]
    # The authors' layers are indices into all layers; the maps begin with layer 0.
    options = {"grid": tuple(told["grid"]), "size": tuple(told["image_size_wh"])}
    options |= {"layers": told["layers"], "lam": told["lam"]}
    for steps, name in (("all", "S_all"), ("first", "S_first")):
        fused = contrast.fuse_maps(asked, general, step_mode=steps, **options)
        assert np.allclose(fused, data["out"][name].numpy(), rtol=1e-5, atol=0)
    entropy = attention_entropy(asked)
    assert torch.allclose(entropy, data["out"]["entropy_raw"], atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_llava_of_the_authors(implementation: str) -> None:
    data, told = parts("carve/tiny_llava_capture"), described("tiny_llava_capture")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**told["config"]["vision"]),
        text_config=transformers.LlamaConfig(**told["config"]["text"]),
        image_token_id=told["image_token_id"],
        attn_implementation=implementation,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    missing = model.load_state_dict(data["state"], strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    found = {}
    for which in ("q", "g"):
        inputs = {"input_ids": data["in"][f"{which}_ids"]}
        inputs |= {"pixel_values": data["in"]["pixel_values"]}
        (found[which],) = contrast.capture_visual_attention(
            model, inputs, max_new_tokens=told["max_new_tokens"], end=2
        )
        expected = data["out"][f"{which}_maps"]
        assert torch.allclose(found[which].maps, expected, rtol=0, atol=told["tol"])
        tokens = data["out"][f"{which}_tokens"]
        assert torch.equal(found[which].tokens[: len(tokens)], tokens)
        assert len(found[which].tokens) == len(expected)
    fused = contrast.fuse_maps(found["q"].maps, found["g"].maps, (4, 4), (28, 28))
    assert np.allclose(fused, data["out"]["S"].numpy(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_alone_are_those_of_whole_maps_and_a_cache_changes_nothing() -> None:
    model = tiny.llava("eager")
    ids = torch.tensor([[1, 5, *[65] * 16, 9, 10, 11]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels}
    (found,) = contrast.capture_visual_attention(model, inputs, max_new_tokens=4, layers=[0, 2])
    assert found.layers == (0, 2)
    for step in range(4):
        text = torch.cat([ids, found.tokens[None, :step]], 1)
        whole = model(input_ids=text, pixel_values=pixels, output_attentions=True).attentions
        for place, layer in enumerate(found.layers):
            row = whole[layer][0, :, -1, 2:18].mean(0)
            assert torch.allclose(found.maps[step, place], row, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_row_alone_is_that_of_the_whole_map(implementation: str) -> None:
    model = tiny.llava(implementation)
    inputs = {"input_ids": IDS, "pixel_values": PIXELS[:1]}
    whole = tiny.llava("eager")(**inputs, output_attentions=True).attentions
    (found,) = contrast.capture_visual_attention(model, inputs, only_first=True)
    for layer in range(3):
        row = whole[layer][0, :, -1, 2:18].mean(0)
        assert torch.allclose(found.maps[0, layer], row, rtol=0, atol=1e-6)


def test_a_batch_is_its_prompts_alone() -> None:
    model = tiny.llava("sdpa")
    both = torch.cat([IDS, torch.tensor([[0, 0, 1, *[65] * 16, 4, 7]])])
    real = (both != 0).long()
    inputs = {"input_ids": both, "pixel_values": PIXELS, "attention_mask": real}
    free = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, 21:]
    end = int(free[0, 1])  # the first prompt's text ends there
    assert end not in free[1].tolist()
    batch = contrast.capture_visual_attention(model, inputs, max_new_tokens=5, end=end)
    assert [len(found.maps) for found in batch] == [2, 5]
    parts = ((IDS, PIXELS[:1]), (both[1:, 2:], PIXELS[1:]))
    for found, (ids, pixels) in zip(batch, parts, strict=True):
        alone = {"input_ids": ids, "pixel_values": pixels}
        (single,) = contrast.capture_visual_attention(model, alone, max_new_tokens=5, end=end)
        assert torch.equal(found.tokens, single.tokens)
        assert torch.allclose(found.maps, single.maps, atol=1e-5)


def test_windows_and_early_stops() -> None:
    model = tiny.decoder("Mistral", "sdpa")  # sees 4 tokens back
    ids = torch.tensor([[1, 5, 65, 65, 65, 9, 10]])
    image = ids == 65
    (found,) = contrast.capture_visual_attention(
        model, {"input_ids": ids}, image=image, max_new_tokens=4
    )
    assert found.maps[0, 0].gt(0).tolist() == [False, True, True]
    assert found.maps[1, 0].gt(0).tolist() == [False, False, True]
    assert not found.maps[2:].any()
    runs: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: runs.append(1))
    (early,) = contrast.capture_visual_attention(
        model, {"input_ids": ids}, image=image, layers=[1], only_first=True
    )
    assert len(runs) == 1  # of three layers' one: the second's attention was the last thing
    assert not len(early.tokens)
    assert torch.equal(early.maps[0, 0], found.maps[0, 1])


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_saves_most_of_the_time() -> None:
    model = tiny.llava("eager", max_position_embeddings=1024)
    prompt = torch.cat([IDS, torch.full((1, 579), 3)], 1)
    inputs = {"input_ids": prompt, "pixel_values": PIXELS[:1]}

    def cached() -> torch.Tensor:
        (found,) = contrast.capture_visual_attention(model, inputs, max_new_tokens=16)
        return found.tokens

    def whole() -> None:
        text = prompt
        for _ in range(16):
            result = model(input_ids=text, pixel_values=PIXELS[:1], output_attentions=True)
            text = torch.cat([text, result.logits[:, -1:].argmax(-1)], 1)

    times: dict[str, float] = {}
    for _ in range(3):
        for run in (cached, whole):
            start = time.process_time()
            run()
            spent = time.process_time() - start
            times[run.__name__] = min(spent, times.get(run.__name__, math.inf))
    assert times["whole"] > 3 * times["cached"], times


def test_the_contrast_is_a_minimum() -> None:
    made = torch.Generator().manual_seed(0)
    asked, general = torch.rand(2, 20, generator=made, dtype=torch.float64).softmax(-1)
    lam = 0.03
    a = contrast.contrast_attention(asked, general, lam).requires_grad_()

    def objective(a: torch.Tensor) -> torch.Tensor:
        return ((a * general - asked) ** 2 + lam * a**2 * general).sum()

    (gradient,) = torch.autograd.grad(objective(a), a)
    assert float(gradient.abs().max()) < 1e-10
    hessian = torch.autograd.functional.hessian(objective, a.detach())
    assert float(torch.linalg.eigvalsh(hessian).min()) > 0
    step = 1e-4 * torch.randn(20, generator=made, dtype=torch.float64)
    with torch.no_grad():
        assert objective(a + step) > objective(a)
        assert objective(a - step) > objective(a)
        for place in torch.eye(20, dtype=torch.float64) * 1e-5:
            slope = (objective(a + place) - objective(a - place)) / 2e-5
            assert abs(float(slope)) < 1e-9  # by finite differences, too


def test_entropy_and_colours() -> None:
    assert float(attention_entropy(torch.full((1, 25), 0.04))) == pytest.approx(math.log(25))
    assert float(attention_entropy(torch.eye(4)[:1])) == 0
    assert contrast.color_complexity(np.full((4, 4, 3), 90, np.uint8)) == 0
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    assert 0.9 < contrast.color_complexity(noise) <= 1


def test_edges_are_texture() -> None:
    pytest.importorskip("skimage")
    assert contrast.texture_complexity(np.full((32, 32, 3), 90, np.uint8)) == 0
    y, x = np.mgrid[:32, :32]
    squares = np.repeat((((y // 4 + x // 4) % 2) * 255).astype(np.uint8)[..., None], 3, 2)
    half = np.repeat(((x >= 16) * 255).astype(np.uint8)[..., None], 3, 2)
    few, many = contrast.texture_complexity(half), contrast.texture_complexity(squares)
    assert 0 < few < many < 1


def test_maps_as_a_record(tmp_path: Path) -> None:
    maps = torch.rand(2, 3, 16).softmax(-1)
    record = contrast.VisualMaps(maps, (0, 1, 2), torch.tensor([5, 6]))
    assert record.entropy == pytest.approx(float(attention_entropy(maps[-1]).mean()))
    assert json.loads(record.to_json())["layers"] == [0, 1, 2]
    record.picture(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_bad_requests() -> None:
    maps = torch.rand(2, 3, 16)
    with pytest.raises(ValueError, match="maps have 16 tokens"):
        contrast.fuse_maps(maps, maps, (3, 4), (8, 8))
    with pytest.raises(ValueError, match="step_mode 'some'"):
        contrast.fuse_maps(maps, maps, (4, 4), (8, 8), step_mode="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shapes"):
        contrast.contrast_attention(maps, maps[:1])
    with pytest.raises(ValueError, match="same layers and tokens"):
        contrast.fuse_maps(maps, maps[:, :2], (4, 4), (8, 8))
    with pytest.raises(ValueError, match=r"layers \[3\]"):
        contrast.fuse_maps(maps, maps, (4, 4), (8, 8), layers=[0, 3])
    with pytest.raises(ValueError, match="no square"):
        contrast.fuse_maps(maps[..., :15], maps[..., :15], None, (8, 8))
    with pytest.raises(ValueError, match="lam -1"):
        contrast.contrast_attention(maps, maps, -1)
    model = tiny.llava()
    two = torch.full((2, 4), 65)
    right = {"input_ids": two, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    with pytest.raises(ValueError, match="padded on the right"):
        contrast.capture_visual_attention(model, right)
    with pytest.raises(ValueError, match=r"no token of prompts \[0\]"):
        contrast.capture_visual_attention(model, {"input_ids": torch.ones(1, 4).long()})
    with pytest.raises(ValueError, match=r"layers \[30\]"):
        contrast.capture_visual_attention(model, {"input_ids": two[:1]}, layers=[30])
    with pytest.raises(ValueError, match="bool mask of shape"):
        contrast.capture_visual_attention(model, {"input_ids": two}, image=two[:1] == 65)
    assert not STATIONS  # nothing was left open
