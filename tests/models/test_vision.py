"""What vision backbones share."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from torch.nn.functional import layer_norm

from regard.core.budgets import relative_error
from regard.models.vision import (
    DropPath,
    PatchEmbed,
    PatchMerging,
    Stage,
    VisionConfig,
    drop_rates,
    variant,
)
from regard.models.vision.blocks import resized


def test_branches_are_left_out_per_image_and_scaled():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2).double()
    assert torch.equal(drop.eval()(x), x)
    y = drop.train()(x)
    assert set(y[:, 0, 0].tolist()) == {0.0, 1 / 0.75}
    assert (y == y[:, :1, :1]).all()
    assert abs(float(y.mean()) - 1) < 0.05
    assert DropPath(0.0).train()(x) is x


def test_rates_rise_evenly():
    assert drop_rates(0.0, (2, 3)) == [[0.0, 0.0], [0.0, 0.0, 0.0]]
    rates = [rate for stage in drop_rates(0.4, (2, 3)) for rate in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drop_rates(0.4, (1,)) == [[0.0]]


def test_neighbours_are_merged_in_the_published_order():
    merging, x = PatchMerging(2, 3).double(), torch.randn(1, 4, 6, 2).double()
    four = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    joined = layer_norm(torch.cat(four, 3), (8,))
    assert relative_error(merging(x), merging.reduction(joined)) < 1e-12
    assert merging(x[:, :3, :5]).shape == (1, 2, 3, 3)


def test_norms_of_an_embedding():
    torch.manual_seed(0)
    x = 5 + torch.randn(1, 5, 7, 4)
    plain, after, before = (PatchEmbed(4, 6, 2, norm=norm) for norm in (None, "after", "before"))
    for other in (after, before):
        other.proj.load_state_dict(plain.proj.state_dict())
    assert relative_error(after(x), layer_norm(plain(x), (6,))) < 1e-6
    assert relative_error(before(x), plain(layer_norm(x, (4,)))) < 1e-6
    assert plain(x).shape == (1, 2, 3, 6)
    filled = PatchEmbed(4, 6, 2, norm="before", fill=True)
    assert filled(x).shape == (1, 3, 4, 6)
    wide = torch.nn.functional.pad(layer_norm(x, (4,)), (0, 0, 0, 1, 0, 1))
    plain.proj.load_state_dict(filled.proj.state_dict())
    assert relative_error(filled(x), plain(wide)) < 1e-6  # zeros come after the norm


def test_positions_are_resized_to_the_map():
    stage = Stage(torch.nn.Identity(), [], (2, 3, 4))
    torch.nn.init.normal_(stage.position)
    x = torch.zeros(2, 2, 3, 4)
    assert torch.equal(stage(x), stage.position.expand(2, -1, -1, -1))
    assert stage(torch.zeros(2, 5, 6, 4)).shape == (2, 5, 6, 4)
    assert torch.equal(resized(stage.position, (2, 3)), stage.position)
    constant = torch.ones(1, 2, 3, 4)
    assert torch.allclose(resized(constant, (7, 5)), torch.ones(1, 7, 5, 4))


def test_a_variant_is_a_config_with_other_defaults():
    small = variant(VisionConfig, "small", "A small one.", classes=10)
    parameters = inspect.signature(small).parameters
    assert parameters["classes"].default == 10
    assert parameters["channels"].default == 3
    assert inspect.getdoc(small) == "A small one."
    assert small.__name__ == "small"
    assert small(channels=1) == VisionConfig(classes=10, channels=1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        small(colours=1)


def test_a_config_passes_through_json():
    config = VisionConfig(classes=7, drop_path=0.1)
    assert VisionConfig.of(json.loads(json.dumps(config.plain()))) == config
    with pytest.raises(ValueError, match=r"plain must be of known fields, got 'clases'; did you"):
        VisionConfig.of({"clases": 3})
    with pytest.raises(ValueError, match="classes must be an int of at least 1"):
        VisionConfig(classes=0)
