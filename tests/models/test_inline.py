"""The InLine families against the authors' code, their checkpoints and their tables."""

from __future__ import annotations

import json

import pytest
import torch

import regard
from golden_files import parts, settings
from regard.core.budgets import budget, relative_error
from regard.mixers.window import relative_positions
from regard.models import published
from regard.models.inline import (
    InlineCSwin,
    InlineCSwinConfig,
    InlineDeiTConfig,
    InlinePVTConfig,
    InlineSwin,
    InlineSwinConfig,
)

MILLIONS = {
    "deit_tiny": 6.48, "deit_small": 16.73, "deit_base": 23.80,
    "pvt_tiny": 12.03, "pvt_small": 21.56, "pvt_medium": 37.62, "pvt_large": 51.15,
    "swin_tiny": 29.22, "swin_small": 49.79, "swin_base": 88.35, "swin_base_384": 88.47,
    "cswin_tiny": 20.60, "cswin_small": 33.03, "cswin_base": 73.41,
}  # fmt: skip
FAMILIES = ("deit", "pvt", "swin", "cswin")
# Names of the authors' arguments -> ours.
OURS = {
    "img_size": "image_size", "num_heads": "heads", "num_classes": "classes",
    "embed_dims": "dims", "sr_ratios": "reductions", "attn_type": "attention",
    "window_size": "window", "split_size": "stripes",
}  # fmt: skip


def sizes_of(family: str) -> dict:
    """The arguments of the golden model, as ours."""
    config = settings(f"inline_attention/model_{family}")
    for name in ("la_sr_ratios", "la_split_size"):  # only the one published value works there
        config.pop(name, None)
    found = {OURS.get(name, name): value for name, value in config.items()}
    if family == "deit":
        found["dim"] = found.pop("embed_dim")
    if family in ("swin", "cswin"):
        stages, first = len(found["heads"]), found.pop("embed_dim")
        found["dims"] = [first * 2**stage for stage in range(stages)]
        found["mlp_ratios"] = [found.pop("mlp_ratio")] * stages
    if family == "cswin":
        found["depths"] = found.pop("depth")
    return found


def golden_model(family: str, tmp_path, **changes):
    data = parts(f"inline_attention/model_{family}")
    torch.save({"model": data["state"], "epoch": 300}, tmp_path / "published.pth")
    sizes = {**sizes_of(family), **changes}
    name = f"inline_{family}_tiny"
    return data, regard.create_model(name, checkpoint=tmp_path / "published.pth", **sizes)


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_those_of_the_table(name):
    model = regard.create_model(f"inline_{name}", device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == MILLIONS[name]


def test_all_published_ones_are_there():
    assert {n for n in regard.models.names() if n.startswith("inline_")} == {
        f"inline_{name}" for name in MILLIONS
    }
    summaries = [published[f"inline_{name}"].summary for name in MILLIONS]
    assert len(set(summaries)) == len(MILLIONS)
    assert summaries[0] == "InLine DeiT tiny: a column of equal blocks with a class token."


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_authors(family, tmp_path):
    data, model = golden_model(family, tmp_path)
    model.eval()
    x = data["in"]["x"].requires_grad_()
    y = model(x)
    assert (y - data["out"]["y"]).abs().max() < 1e-4
    assert relative_error(y, data["out"]["y"]) < budget(torch.float32)
    y.backward(data["in"]["grad_out"])
    if "grad" in data:
        error = relative_error(x.grad, data["grad"]["x"])
        assert error < budget(torch.float32, "gradient")
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_their_tensors(family, tmp_path):
    data, model = golden_model(family, tmp_path)
    keys = published[f"inline_{family}_tiny"].keys
    theirs = keys.to_theirs(model.state_dict())
    learned = {n: t for n, t in data["state"].items() if "_mask" not in n and "_index" not in n}
    assert theirs.keys() == learned.keys()
    assert all(torch.equal(theirs[name], learned[name]) for name in learned)
    torch.save({n: t for n, t in data["state"].items() if n != "head.bias"}, tmp_path / "short.pth")
    name, sizes = f"inline_{family}_tiny", sizes_of(family)
    with pytest.raises(ValueError, match=r"checkpoint must be that of exactly .* no head\.bias"):
        regard.create_model(name, checkpoint=tmp_path / "short.pth", **sizes)
    torch.save({**data["state"], "extra": torch.zeros(1)}, tmp_path / "long.pth")
    with pytest.raises(ValueError, match="the unknown extra"):
        regard.create_model(name, checkpoint=tmp_path / "long.pth", **sizes)


def test_what_swin_computes_from_its_sizes_is_not_read(tmp_path):
    data, model = golden_model("swin", tmp_path)
    index = data["state"]["layers.1.blocks.0.attn.relative_position_index"]
    assert torch.equal(relative_positions((7, 7)), index)
    assert "layers.1.blocks.1.attn_mask" in data["state"]
    assert not [name for name in model.state_dict() if "mask" in name or "index" in name]
    torch.save(published["inline_swin_tiny"].keys.to_theirs(model.state_dict()), tmp_path / "a.pth")
    again = regard.create_model(
        "inline_swin_tiny", checkpoint=tmp_path / "a.pth", **sizes_of("swin")
    )
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("name", MILLIONS)
def test_every_key_table_there_and_back(name):
    """On the meta device: every name of ours has names of theirs, and they lead back."""
    model, keys = regard.create_model(f"inline_{name}", device="meta"), published[f"inline_{name}"]
    theirs = keys.keys.to_theirs(model.state_dict())
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    assert shapes.keys() == keys.keys.to_ours("test", theirs, shapes).keys()
    count = sum(tensor.numel() for tensor in theirs.values())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    found = keys.measured(theirs)
    config = keys.config()
    assert found.pop("classes") == 1000
    assert {n: getattr(config, n) for n in found} == found
    assert "depth" in found or {"depths", "attention"} <= set(found)


def test_names_of_the_families():
    def keys(name: str, **sizes) -> set[str]:
        model = regard.create_model(f"inline_{name}", device="meta", **sizes)
        return set(published[f"inline_{name}"].keys.to_theirs(model.state_dict()))

    leaves = ("weight", "bias")
    residual = [f"attn.residual.{i}.{leaf}" for i in (0, 2) for leaf in leaves]
    assert {f"blocks.11.{n}" for n in residual} <= keys("deit_tiny")
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.bias"} <= keys("deit_tiny")
    pvt = keys("pvt_tiny", attention="IIIS", reductions=(8, 4, 2, 2))
    assert {"pos_embed4", "patch_embed3.norm.weight", "block1.1.attn.kv.bias"} <= pvt
    assert {"block4.0.attn.sr.weight", "block4.1.attn.norm.bias"} <= pvt
    assert not [n for n in pvt if n.startswith(("norm.", "block4.0.attn.residual"))]
    swin = keys("swin_base")
    assert {f"layers.2.blocks.1.{n}" for n in residual} <= swin
    assert "layers.2.blocks.2.attn.relative_position_bias_table" in swin
    assert "layers.2.downsample.reduction.weight" in swin
    cswin = keys("cswin_tiny")
    assert {"stage1_conv_embed.0.weight", "stage1_conv_embed.2.bias", "merge3.conv.bias"} <= cswin
    assert {"stage1.0.attns.0.residual.2.weight", "stage3.17.attns.1.get_v.bias"} <= cswin
    assert not [n for n in cswin if n.startswith(("stage1.0.attns.1", "stage4.0.attns.1"))]


def test_depths_and_classes_come_from_the_checkpoint(tmp_path):
    sizes = sizes_of("cswin") | {"depths": (2, 1, 3, 1), "classes": 7, "attention": "SIMS1"}
    model = InlineCSwin(InlineCSwinConfig(**sizes))
    torch.save(published["inline_cswin_tiny"].keys.to_theirs(model.state_dict()), tmp_path / "a.pt")
    for name in ("depths", "classes", "attention"):
        del sizes[name]
    found = regard.create_model("inline_cswin_tiny", checkpoint=tmp_path / "a.pt", **sizes)
    assert found.config == model.config
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(found.eval()(x), model.eval()(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_trained_and_read_again(family, tmp_path):
    _, model = golden_model(family, tmp_path, drop_path=0.3)
    side = model.config.image_size
    x = torch.randn(2, 3, side, side)
    torch.manual_seed(0)
    one = model.train()(x)
    one.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.equal(one, model(x))  # branches are left out by chance
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert again.config == model.config
    assert json.loads(json.dumps(model.config.plain()))["drop_path"] == 0.3
    assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("family", ["pvt", "swin", "cswin"])
def test_maps_and_images_of_other_sides(family, tmp_path):
    _, model = golden_model(family, tmp_path)
    model.eval()
    sides = (40, 64) if family == "pvt" else (64, 96)
    with torch.no_grad():
        maps = model.maps(torch.randn(1, 3, *sides))
        assert model(torch.randn(1, 3, *sides)).shape == (1, 10)
    assert [m.shape[1] for m in maps] == list(model.config.dims)
    expected = tuple(side // 4 for side in sides)
    for found in maps:
        assert tuple(found.shape[2:]) == expected
        expected = tuple(side // 2 if family == "pvt" else -(-side // 2) for side in expected)


def test_windows_of_inline_blocks_are_images_of_their_own():
    """As in the released code: every window has its own mean, and shifted ones have no walls."""
    sizes = {"dims": (8, 16), "depths": (2, 1), "heads": (1, 2), "mlp_ratios": (2, 2)}
    config = InlineSwinConfig(**sizes, attention="II", image_size=64, window=8, classes=5)
    torch.manual_seed(0)
    model = InlineSwin(config).double().eval()
    first, second = model.stages[0].blocks
    assert (first.attn.window, first.attn.shift, second.attn.shift) == (8, 0, 4)
    x = torch.randn(1, 16, 16, 8).double()
    window = first.attn(x[:, :8, 8:])
    assert relative_error(first.attn(x)[:, :8, 8:], window) < 1e-12
    shifted = second.attn(x)
    second.attn.shift = 0
    rolled = second.attn(x.roll((-4, -4), (1, 2))).roll((4, 4), (1, 2))
    assert relative_error(shifted, rolled) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InlineSwinConfig(attention="IIX"), "attention must be 4 letters of I, S, M"),
        (lambda: InlineSwinConfig(attention="IIMS"), "attention must be 4 letters of I, S, M and"),
        (lambda: InlineSwinConfig(depths=(2, 2)), "depths must be of 4 numbers, as dims"),
        (lambda: InlineSwinConfig(dims=96), "dims must be a tuple with a number per stage"),
        (lambda: InlineSwinConfig(feature_map="gelu"), "feature_map must be one of"),
        (lambda: InlineSwinConfig(drop_path=1.0), "drop_path must be a probability below 1"),
        (lambda: InlineDeiTConfig(image_size=100), "image_size must be a multiple of patch_size"),
        (lambda: InlinePVTConfig(reductions=(1,)), "reductions must be of 4 numbers"),
        (lambda: InlineCSwinConfig(stripes=(1, 2, 3, 7)), "stripes must be divisors of the sides"),
        (lambda: InlineCSwinConfig(heads=(2, 4, 9, 16)), "heads must be even where stripes cross"),
        (lambda: InlineSwin(InlineDeiTConfig()), "config must be a InlineSwinConfig"),
        (lambda: InlineSwinConfig.of({"window": 7, "windw": 3}), "did you mean 'window'"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_wrong_images_are_named(tmp_path):
    _, model = golden_model("deit", tmp_path)
    with pytest.raises(ValueError, match="InlineDeiT: image must be of 32 x 32 pixels"):
        model(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"InlineDeiT: image must be of shape \[batch, 3,"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(TypeError, match="image must be a floating-point tensor"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
    _, model = golden_model("cswin", tmp_path, stripes=(2, 2, 1, 1))
    with pytest.raises(ValueError, match="InlineCSwin: image must be of a size whose maps"):
        model(torch.zeros(1, 3, 36, 32))
