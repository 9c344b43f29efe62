"""L2ViT against the authors' code, its checkpoints and its table."""

from __future__ import annotations

import pytest
import torch

import regard
from golden_files import parts, settings
from regard.core.budgets import budget, relative_error
from regard.models import published
from regard.models.l2vit import L2ViT, L2ViTConfig, LGABlock, LWABlock

MILLIONS = {"tiny": 28.60, "small": 50.20, "base": 88.58, "base_384": 88.58}
SIZES = {
    "dims": (8, 12, 16, 24), "heads": (1, 2, 2, 3), "depths": (2, 2, 2, 2),
    "mlp_ratios": (2.0, 2.0, 2.0, 2.0), "window": 3, "classes": 10,
}  # fmt: skip
BLOCKS = {"lga_block": LGABlock, "lwa_block_padded": LWABlock}


def small(**changes) -> L2ViT:
    torch.manual_seed(0)
    return L2ViT(L2ViTConfig(**{**SIZES, **changes}))


@pytest.fixture
def golden(tmp_path):
    """The authors' small model: data, and ours with its weights."""
    data = parts("l2vit/model_small")
    torch.save({"model": data["state"]}, tmp_path / "published.pth")
    sizes = {name: value for name, value in SIZES.items() if name not in ("depths", "classes")}
    return data, regard.create_model(
        "l2vit_tiny", checkpoint=tmp_path / "published.pth", **sizes
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_and_keys_are_those_of_the_table(name):
    model, variant = regard.create_model(f"l2vit_{name}", device="meta"), published[f"l2vit_{name}"]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == MILLIONS[name]
    theirs = variant.keys.to_theirs(model.state_dict())
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    assert variant.keys.to_ours("test", theirs, shapes).keys() == shapes.keys()
    config = variant.config()
    assert variant.measured(theirs) == {"depths": config.depths, "classes": 1000}
    assert theirs["downsample_layers.0.proj.proj.3.weight"].shape[0] == config.dims[0]
    assert theirs["stages.2.1.attn.temperature"].shape == (config.heads[2], 1, 1)
    assert {f"stages.0.0.cpe.{i}.proj.weight" for i in (0, 1)} <= set(theirs)
    assert "stages.0.1.local_mp.bn.running_var" in theirs
    assert "stages.0.1.cpe.1.proj.weight" not in theirs
    assert config.window == (12 if name == "base_384" else 7)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_the_authors(name):
    data, config = parts(f"l2vit/{name}"), settings(f"l2vit/{name}")
    names = {"num_heads": "heads", "window_size": "window"}
    block = BLOCKS[name](**{names.get(n, n): value for n, value in config.items()}).eval()
    block.load_state_dict(data["state"])
    x = data["in"]["x"].requires_grad_()
    y = block(x.view(2, 5, 6, 16)).view_as(x)
    assert relative_error(y, data["out"]["y"]) < budget(torch.float32)
    y.backward(data["in"]["grad_out"])
    found = {"x": x.grad, **{n: p.grad for n, p in block.named_parameters()}}
    for n, expected in data["grad"].items():
        assert relative_error(found[n], expected) < budget(torch.float32, "gradient"), n


def test_logits_of_the_authors(golden):
    data, model = golden
    y = model(data["in"]["x"])
    assert (y - data["out"]["y"]).abs().max() < 1e-4
    assert relative_error(y, data["out"]["y"]) < budget(torch.float32)
    assert published["l2vit_tiny"].keys.to_theirs(model.state_dict()).keys() == data["state"].keys()


def test_the_gradient_is_that_of_the_logits(golden):
    data, model = golden
    model.double()
    x, weight = data["in"]["x"].double().requires_grad_(), data["in"]["grad_out"].double()
    (found,) = torch.autograd.grad((model(x) * weight).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        ahead, back = (model(x + step * direction) for step in (1e-6, -1e-6))
    numeric = ((ahead - back) * weight).sum() / 2e-6
    assert relative_error((found * direction).sum(), numeric) < 1e-5


@pytest.mark.parametrize("sides", [(32, 32), (33, 47), (64, 36), (57, 39)])
def test_any_image_has_maps_of_halved_sides(sides):
    model = small(features_only=True).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *sides))
    expected = tuple(-(-side // 4) for side in sides)
    for dim, found in zip(SIZES["dims"], maps, strict=True):
        assert tuple(found.shape) == (1, dim, *expected)
        expected = tuple(-(-side // 2) for side in expected)
    assert small().eval()(torch.randn(1, 3, *sides)).shape == (1, 10)


def test_an_image_filled_up_with_zeros_is_the_same():
    model = small().eval()
    x = torch.randn(1, 3, 30, 45)
    filled = torch.nn.functional.pad(x, (0, 3, 0, 2))
    with torch.no_grad():
        assert relative_error(model(x), model(filled)) < 1e-6


def test_features_are_normalised_maps(tmp_path):
    model = small(features_only=True).eval()
    keys = published["l2vit_tiny"].keys
    theirs = keys.to_theirs(model.state_dict())
    assert {"norm0.weight", "norm3.bias"} <= set(theirs)
    assert not [name for name in theirs if name.startswith(("norm.", "head."))]
    torch.save(theirs, tmp_path / "detector.pth")
    sizes = {name: SIZES[name] for name in ("dims", "heads", "mlp_ratios", "window")}
    again = regard.create_model("l2vit_tiny", checkpoint=tmp_path / "detector.pth", **sizes).eval()
    assert again.config.features_only
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        maps = again(x)
        assert all(torch.equal(a, b) for a, b in zip(maps, model(x), strict=True))
    assert maps[1].mean(1).abs().max() < 1e-5


def test_blocks_take_turns():
    for blocks, kinds in (
        ("mixed", [LWABlock, LGABlock]), ("local", [LWABlock] * 2), ("global", [LGABlock] * 2)
    ):  # fmt: skip
        model = small(blocks=blocks)
        assert all([type(b) for b in stage.blocks] == kinds for stage in model.stages)
    assert LGABlock(8, 2, enhanced=False).local_mp is None


def test_batch_norms_train_and_evaluate():
    model = small(drop_path=0.0)
    x = torch.randn(4, 3, 32, 32)
    first = model.train()(x)
    first.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    norm = model.stages[0].blocks[1].local_mp.bn
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.any()
    before = norm.running_mean.clone()
    model.eval()(x)
    assert torch.equal(norm.running_mean, before)
    # While training, the means of the batch take the place of the running ones.
    image = torch.randn(4, 8, 6, 6)
    local = model.stages[0].blocks[1].local_mp.train()
    hidden = torch.nn.functional.gelu(local.conv1(image))
    mean, var = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), unbiased=False)
    normal = (hidden - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    normal = normal * local.bn.weight.view(1, -1, 1, 1) + local.bn.bias.view(1, -1, 1, 1)
    assert relative_error(local(image), local.conv2(normal)) < 1e-5


def test_saved_and_read_again_in_another_dtype(tmp_path):
    model = small().eval()
    model.save_pretrained(tmp_path)
    again = L2ViT.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.stages[0].embed.proj[1].num_batches_tracked.dtype == torch.int64
    x = torch.randn(1, 3, 32, 32)
    assert relative_error(again(x.double()), model(x)) < 1e-5
    assert again.config == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": "convnext"}, "L2ViTConfig: blocks must be one of 'mixed', 'local', 'global'"),
        ({"dims": (7, 12, 16, 24)}, "L2ViTConfig: dims must be even at first"),
        ({"heads": (1, 2)}, "L2ViTConfig: heads must be of 4 numbers, as dims"),
        ({"minimum": -1.0}, "L2ViTConfig: minimum must be a finite number of at least 0.0"),
        ({"window": 0}, "L2ViTConfig: window must be an int of at least 1"),
        ({"features_only": 1}, "L2ViTConfig: features_only must be True or False"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small(**changes)
