"""BiFormer against the authors' code, its checkpoints and its table."""

from __future__ import annotations

import pytest
import torch

import regard
from golden_files import parts
from regard.models import published
from regard.models.biformer import BiFormer, BiFormerConfig

COUNTS = {
    "tiny": 13_142_760, "small": 25_536_232, "base": 56_804_968, "stl": 28_372_552,
    "stl_nchw": 28_372_552,
}  # fmt: skip
SIZES = {
    "dims": (16, 24, 32, 40), "mlp_ratios": (2, 2, 2, 2), "topks": (1, 2, 4, -2), "n_win": 2,
    "head_dim": 8,
}  # fmt: skip


def small(**changes) -> BiFormer:
    torch.manual_seed(0)
    sizes = {**SIZES, "depths": (1, 1, 1, 1), "classes": 10, **changes}
    return BiFormer(BiFormerConfig(**sizes)).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_keys_are_those_of_the_table(name):
    model = regard.create_model(f"biformer_{name}", device="meta")
    variant = published[f"biformer_{name}"]
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
    theirs = variant.keys.to_theirs(model.state_dict())
    assert theirs.keys() == model.state_dict().keys()
    config = variant.config()
    assert variant.measured(theirs) == {"depths": config.depths, "classes": 1000}
    shapes = {n: tuple(t.shape) for n, t in theirs.items()}
    wide = config.dims[0]
    if name == "stl_nchw":
        assert shapes["stages.0.blocks.1.attn.qkv_linear.weight"] == (3 * wide, wide, 1, 1)
        assert shapes["stages.3.blocks.0.attn.qkv.weight"] == (2304, 768, 1, 1)
        assert shapes["stages.0.blocks.0.mlp.2.weight"] == (wide, 4 * wide, 1, 1)
    elif name == "stl":
        assert shapes["downsample_layers.0.0.weight"] == (wide, 3, 4, 4)
        assert shapes["downsample_layers.1.1.weight"] == (2 * wide, wide, 2, 2)
    else:
        assert shapes["downsample_layers.0.3.weight"] == (wide, wide // 2, 3, 3)
        assert shapes["stages.0.0.attn.qkv.qkv.weight"] == (3 * wide, wide)
        assert shapes["stages.3.1.attn.lepe.weight"] == (8 * wide, 1, 5, 5)
        assert "stages.3.0.attn.qkv.bias" not in shapes


def test_logits_and_maps_of_the_authors(tmp_path):
    data = parts("biformer/model_biformer")
    torch.save({"model": data["state"]}, tmp_path / "published.pth")
    model = regard.create_model(
        "biformer_tiny", checkpoint=tmp_path / "published.pth", **SIZES
    ).eval()  # fmt: skip
    with torch.no_grad():
        assert (model(data["in"]["x"]) - data["out"]["logits"]).abs().max() < 1e-4
        for stage, found in enumerate(model.maps(data["in"]["x"])):
            assert (found - data["out"][f"stage{stage}"]).abs().max() < 5e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"features_only": True},
        {"topks": (1, 2, 0, -1), "layer_scale": 0.1, "mlp_dwconv": True, "pre_norm": False},
        {"kind": "stl", "pos_dwconv": 0},
        {"kind": "stl", "pos_dwconv": 0, "layout": "nchw", "topks": (1, 2, 0, -1)},
        {"kv_downsample": "ada_avgpool", "kv_per_wins": (1, 1, 1, 1), "soft_routing": True},
        {"padding": "masked"},
    ],
    ids=str,
)
def test_every_option_has_gradients_and_can_be_saved(changes, tmp_path):
    model = small(**changes).train()
    x = torch.randn(2, 3, 64, 80)
    y = model(x)
    y = torch.cat([part.flatten() for part in y]) if isinstance(y, tuple) else y
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    theirs = published["biformer_tiny"].keys.to_theirs(model.state_dict())
    assert theirs.keys() == model.state_dict().keys()
    model.eval().save_pretrained(tmp_path)
    again = BiFormer.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again.maps(x)[-1], model.maps(x)[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topks": (1, 2)}, "topks must be a tuple of 4 numbers"),
        ({"topks": (1, 2, 3, -3)}, "topks must be an int of at least -2"),
        ({"layout": "nchw"}, "layout must be 'nhwc' with kind='biformer'"),
        ({"kind": "stl"}, "pos_dwconv must be False or 0 with kind='stl'"),
        ({"dims": (15, 24, 32, 40)}, "dims must be even at first"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=f"BiFormerConfig: {message}"):
        small(**changes)
