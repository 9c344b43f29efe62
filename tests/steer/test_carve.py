"""CARVE: regions and crops of the authors, planted regions, and the whole of it on a tiny Llava."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_models as tiny
from golden_files import GOLDEN, parts
from regard.lens.contrast import capture_visual_attention, contrast_attention, fuse_maps
from regard.steer import carve as carving

STRATEGIES = ("attention_sum", "size", "remove_small")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_regions_of_the_authors(strategy: Any) -> None:
    data = parts("carve/fuse_mask")["out"]
    told = json.loads((GOLDEN / "carve/fuse_mask.json").read_text())
    fused, expected = data["S_all"].numpy(), data[f"mask_{strategy}"].numpy()
    mask = carving.select_regions(
        fused,
        told["top_percent"],
        told["min_keep_regions"],
        strategy,
        told["outlier_percent_for_remove_small"],
    )
    assert (mask != expected.astype(bool)).mean() <= told["tol"]["mask_mismatch_fraction"]


def test_crop_of_the_authors() -> None:
    data = parts("carve/fuse_mask")
    image, out = data["in"]["image"].numpy(), data["out"]
    refined = carving.refine_image(image, out["mask_attention_sum"].numpy().astype(bool))
    assert refined.box == tuple(out["bbox"].tolist())
    assert np.array_equal(refined.masked, out["masked_image"].numpy())
    expected = out["refined"].numpy()
    assert refined.image.shape == expected.shape
    assert np.abs(refined.image.astype(float) - expected).mean() < 1


def test_everything_kept_is_the_image_itself() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    fused = np.random.default_rng(1).random((30, 40))
    mask = carving.select_regions(fused, p=1.0)
    assert mask.all()
    refined = carving.refine_image(image, mask)
    assert refined.box == (0, 0, 40, 30)
    assert np.array_equal(refined.image, image)


def test_a_contrast_of_equals_keeps_something() -> None:
    same = torch.rand(2, 3, 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    fused = fuse_maps(same, same, None, (40, 30))
    assert np.isfinite(fused).all()
    assert np.ptp(fused) < 1e-4 * fused.max()
    for strategy in STRATEGIES:
        assert carving.select_regions(fused, 0.2, strategy=strategy).any()
        assert carving.select_regions(np.ones((30, 40)), 0.2, strategy=strategy).all()


@pytest.mark.parametrize("size", [(30, 40), (49, 49), (15, 31)])
def test_crops_keep_their_shape(size: tuple[int, int]) -> None:
    """No side ends up shorter than the image's, whatever the rounding of the factor."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for height in range(1, size[0] + 1, 4):
        for width in range(1, size[1] + 1, 5):
            mask = np.zeros(size, bool)
            mask[:height, :width] = True
            refined = carving.refine_image(image, mask).image
            assert all(got >= was for got, was in zip(refined.shape[:2], size, strict=True))
            exact = max(size[0] / height, size[1] / width)
            assert abs(refined.shape[0] - height * exact) <= 1
            assert abs(refined.shape[1] - width * exact) <= 1


def test_regions_number_in_reading_order() -> None:
    mask = np.array([[1, 0, 1], [1, 0, 1], [0, 1, 0]], bool)
    labels, count = carving.label_components(mask)
    assert count == 3
    assert labels.tolist() == [[1, 0, 2], [1, 0, 2], [0, 3, 0]]
    kept = carving.select_regions(np.where(mask, 1.0, 0.0), p=0.5, k=1)
    assert kept.tolist() == (labels == 1).tolist()  # of equals, the first


def test_regions_that_meet_late() -> None:
    mask = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    labels, count = carving.label_components(mask)
    assert count == 2
    assert labels[0].tolist() == [1, 0, 2, 0, 2]
    mask[2, 4] = True  # joins both by way of the last row
    assert carving.label_components(mask)[1] == 1
    assert carving.label_components(np.zeros((3, 0), bool))[1] == 0


def test_more_regions_than_asked_for_where_there_are_many() -> None:
    fused = np.zeros((40, 40))
    fused[::2, ::2] = 1 + np.arange(400).reshape(20, 20)  # 400 regions of one pixel
    kept = carving.select_regions(fused, p=0.2, k=3)
    assert kept.sum() == 64  # a fifth of the 320 regions above the threshold
    assert fused[kept].min() == 337


def test_a_planted_question() -> None:
    made = np.random.default_rng(0)
    side = 24
    y, x = np.mgrid[:side, :side]
    meaning = 1 / (1 + ((y - 17.2) ** 2 + (x - 6.1) ** 2) / 6)  # no plateau: ranks mean something
    looks = 0.2 + 0.1 * made.random((side, side)) + 20 * np.exp(-((y - 4) ** 2 + (x - 18) ** 2) / 9)
    general = torch.tensor(looks / looks.sum()).flatten()
    asked = torch.tensor(looks * meaning / (looks * meaning).sum()).flatten()
    found = contrast_attention(asked, general, 1e-8)
    ranks = [np.argsort(np.argsort(v)) for v in (found.numpy(), meaning.ravel())]
    assert np.corrcoef(*ranks)[0, 1] > 0.999
    planted = meaning >= np.percentile(meaning, 95)

    def overlap(question: torch.Tensor, instruction: torch.Tensor) -> float:
        maps = [part.float().view(1, 1, -1) for part in (question, instruction)]
        fused = fuse_maps(*maps, (side, side), (side, side))
        mask = carving.select_regions(fused, p=0.05, k=1)
        return (mask & planted).sum() / (mask | planted).sum()

    assert overlap(asked, general) > 0.8
    assert overlap(asked, torch.ones_like(general)) < 0.4


class Prompts:
    """Makes prompts for a tiny Llava, and counts what its model then does."""

    def __init__(self, model: Any) -> None:
        self.texts: list[tuple[int, str]] = []
        self.prompts = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: tuple, kwargs: dict) -> None:
        self.prompts += kwargs["input_ids"].shape[1] > 1

    def __call__(self, images: list[np.ndarray], text: str) -> dict[str, Any]:
        self.texts.append((len(images), text))
        pixels = [torch.tensor(part.copy()).permute(2, 0, 1) / 255 for part in images]
        pixels = [torch.nn.functional.interpolate(p[None], (28, 28)) for p in pixels]
        ids = [1, *[65] * 16 * len(images), 2 + len(text) % 40, 9]
        return {"input_ids": torch.tensor([ids]), "pixel_values": torch.cat(pixels)}


IMAGE = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)


@pytest.mark.parametrize("include_original", [True, False])
@pytest.mark.parametrize("step_mode", ["all", "first", "last"])
def test_questions_about_one_image(include_original: bool, step_mode: Any) -> None:
    model = tiny.llava("sdpa")
    prepare = Prompts(model)
    results = carving.carve(
        model,
        prepare,
        IMAGE,
        ["Where?", "What colour?"],
        layers=[1, 2],
        max_new_tokens=3,
        step_mode=step_mode,
        include_original=include_original,
    )
    assert len(results) == 2
    for result in results:
        assert result.answer.shape == (3,)
        assert result.mask.shape == (28, 28)
        assert min(result.refined.image.shape[:2]) >= 28
    general = [text for _, text in prepare.texts if text.startswith("Write a general")]
    assert len(general) == 1  # one look at the image serves all questions
    assert prepare.prompts == len(prepare.texts) == 5
    counts = [1, 1, 2, 1, 2] if include_original else [1] * 5
    assert [n for n, _ in prepare.texts] == counts


def test_a_look_from_before_and_no_refinement() -> None:
    model = tiny.llava("sdpa")
    prepare = Prompts(model)
    (general,) = capture_visual_attention(model, prepare([IMAGE], "What?"), max_new_tokens=3)
    before = prepare.prompts
    options = {"max_new_tokens": 3, "p": 1.0, "include_original": False, "suffix": ""}
    (result,) = carving.carve(model, prepare, IMAGE, "Where?", general=general, **options)
    assert prepare.prompts == before + 2
    assert np.array_equal(result.refined.image, IMAGE)
    inputs = prepare([IMAGE], "Where?")
    text = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(result.answer, text[0, inputs["input_ids"].shape[1] :])


def test_processors_and_pictures(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "Where", "is", "it?"]
    vocabulary = {word: number for number, word in enumerate(words)} | {"<image>": 65}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    kept = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers = tiny.transformers
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, additional_special_tokens=["<image>"], **kept
    )
    part = "{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}"
    turn = "{% for c in m.content %}" + part + "{% endfor %}"
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}USER: " + turn + "{% endfor %} ASSISTANT:",
    )
    model = tiny.llava("sdpa")
    picture = Image.fromarray(IMAGE)
    picture.save(tmp_path / "image.png")
    prepare = carving.with_processor(processor)
    results = [
        carving.carve(model, prepare, image, "Where is it?", max_new_tokens=2)[0]
        for image in (IMAGE, picture, tmp_path / "image.png", str(tmp_path / "image.png"))
    ]
    for result in results:
        assert torch.equal(result.answer, results[0].answer)
        assert np.array_equal(result.refined.image, results[0].refined.image)
    results[0].picture(tmp_path / "carved.png")
    with Image.open(tmp_path / "carved.png") as drawn:
        assert drawn.width > 500
    assert json.loads(results[0].to_json())["mask"] == results[0].mask.tolist()


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    model = tiny.llava("sdpa")
    prepare = Prompts(model)
    for name in ("half.png", "text.jpg", "missing.png", ""):
        with pytest.raises(ValueError, match=f"carve: image: '.*{name}' cannot be read"):
            carving.carve(model, prepare, str(tmp_path / name), "Where?")
    for array in (IMAGE.astype(float), IMAGE[..., 0], IMAGE[:0]):
        with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\]"):
            carving.carve(model, prepare, array, "Where?")
    with pytest.raises(TypeError, match="got NoneType"):
        carving.carve(model, prepare, None, "Where?")
    assert not prepare.texts  # refused before anything ran


def test_bad_requests() -> None:
    image, mask = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool)
    with pytest.raises(ValueError, match="mask: is empty"):
        carving.refine_image(image, mask)
    with pytest.raises(ValueError, match="must be uint8"):
        carving.refine_image(image.astype(float), mask)
    with pytest.raises(ValueError, match="p 0"):
        carving.select_regions(np.ones((4, 4)), p=0)
    with pytest.raises(ValueError, match="must be a finite map"):
        carving.select_regions(np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="strategy 'all'"):
        carving.select_regions(np.ones((4, 4)), strategy="all")  # type: ignore[arg-type]
