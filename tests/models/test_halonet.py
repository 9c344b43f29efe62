"""HaloNet against timm's networks and the paper's table."""

from __future__ import annotations

import pytest
import torch

import regard
from golden_files import parts
from regard.models import published
from regard.models.halonet import HaloNet, HaloNetConfig

MILLIONS = {
    "h0": 5.50, "h1": 8.10, "h2": 9.41, "h3": 11.84, "h4": 19.10, "h5": 30.72, "h6": 43.46,
    "h7": 67.43,
}  # fmt: skip
COUNTS = {
    "halonet26t": 12_480_288, "sehalonet33ts": 13_691_712, "halonet50ts": 22_733_280,
    "halo2botnet50ts_256": 22_635_360,
}  # fmt: skip
SIZES = {
    "mids": (8, 8, 16, 32), "outs": (16, 32, 64, 64), "heads": (4, 4, 4, 4), "block": 4,
    "halo": 1, "stem_dim": 16,
}  # fmt: skip


def small(**changes) -> HaloNet:
    torch.manual_seed(0)
    sizes = {**SIZES, "stages": ("c", "c", "ch", "hh"), "classes": 7, **changes}
    return HaloNet(HaloNetConfig(**sizes)).eval()


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_those_of_the_paper(name):
    model = regard.create_model(f"halonet_{name}", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == MILLIONS[name]


@pytest.mark.parametrize("name", [*COUNTS, "eca_halonext26ts"])
def test_parameters_and_keys_are_timms(name):
    model, variant = regard.create_model(name, device="meta"), published[name]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == COUNTS.get(name, count)
    assert name in COUNTS or round(count / 1e6, 3) == 10.757
    theirs = variant.keys.to_theirs(model.state_dict())
    assert theirs.keys() == model.state_dict().keys()
    assert variant.measured(theirs) == {"stages": variant.config().stages, "classes": 1000}
    table = "stages.3.1.self_attn.pos_embed.height_rel"
    assert theirs[table].shape[0] == {"halo2botnet50ts_256": 15}.get(
        name, 23 if "26" in name else 27
    )  # fmt: skip


def test_logits_and_features_of_timm(tmp_path):
    data = parts("halonet/tiny_halonet26t")
    torch.save(data["state"], tmp_path / "published.pth")
    model = regard.create_model("halonet26t", checkpoint=tmp_path / "published.pth", **SIZES).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 33_517
    with torch.no_grad():
        assert (model(data["in"]["x"]) - data["out"]["logits"]).abs().max() < 1e-5
        features = model.maps(data["in"]["x"])[-1]
        assert (features - data["out"]["features"]).abs().max() < 1e-4


@pytest.mark.requires("timm")
@pytest.mark.parametrize("name", ["halonet26t", "sehalonet33ts", "halo2botnet50ts_256"])
def test_networks_of_timm(name, tmp_path):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    ours = regard.create_model(name, checkpoint=tmp_path / "published.pth").eval()
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        wanted = theirs(x)
        assert (ours(x) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_odd_sides_are_filled_up_or_refused():
    x = torch.randn(1, 3, 100, 140)
    assert small()(x).shape == (1, 7)
    with pytest.raises(ValueError, match="multiples of block, 4, where fill=False"):
        small(fill=False)(x)


@pytest.mark.parametrize(
    "changes",
    [
        {"squeeze": True, "act": "silu", "last": 24, "stem_pool": False},
        {"eca": True, "group": 4, "head_dim": 2},
        {"stages": ("c", "c", "ch", "cg"), "global_side": 4},
        {"stages": ("h", "h", "h", "h"), "stem": "single", "values": 2.0},
    ],
    ids=str,
)
def test_every_option_has_gradients_and_can_be_saved(changes, tmp_path):
    model = small(**changes).train()
    x = torch.randn(2, 3, 128, 128)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = HaloNet.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COUNTS, "eca_halonext26ts"])
def test_a_random_checkpoint_is_read_and_used(name, tmp_path):
    theirs = published[name].keys.to_theirs(regard.create_model(name).state_dict())
    torch.save(theirs, tmp_path / "published.pth")
    model = regard.create_model(name, checkpoint=tmp_path / "published.pth").eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 256, 256)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("c", "x", "c", "c")}, "stages must be 4 words of the letters c, h and g"),
        ({"stages": ("c", "c", "c", "g")}, "stages must be without g first in a stage"),
        ({"squeeze": True, "eca": True}, "eca must be False with squeeze=True"),
        ({"act": "gelu"}, "act must be one of 'relu', 'silu'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=f"HaloNetConfig: {message}"):
        small(**changes)
