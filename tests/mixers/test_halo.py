"""The layers of HaloNet against timm's and lucidrains' (with its mask repaired)."""

from __future__ import annotations

import pytest
import torch

from golden_files import parts
from regard.core.budgets import relative_error
from regard.mixers import HaloAttention, ProjectedHaloAttention
from regard.mixers.halo import divisible

GOLDEN = {
    "attn_stride1": lambda: HaloAttention(24, heads=3, block=4, halo=1),
    "attn_stride2_dimhead_bias": lambda: HaloAttention(
        16, 24, stride=2, heads=3, head_dim=6, block=4, halo=2, qkv_bias=True
    ),
    "attn_linear_masked_padding": lambda: ProjectedHaloAttention(
        12, heads=2, head_dim=8, block=4, halo=2
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_layers(name):
    data, layer = parts(f"halonet/{name}"), GOLDEN[name]()
    layer.load_state_dict(data["state"])
    x = data["in"]["x"].requires_grad_()
    y = layer(x)
    assert (y - data["out"]["y"]).abs().max() < 1e-5
    (y * data["in"]["grad_y"]).sum().backward()
    found = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    for n, expected in data["grad"].items():
        assert relative_error(found[n], expected) < 1e-4, n


def test_sides_that_are_no_multiples():
    x = torch.randn(2, 16, 9, 14)
    for settings, shape in (
        ({}, (9, 14)),
        ({"stride": 2}, (5, 7)),
        ({"stride": 2, "avg_down": True}, (5, 7)),
        ({"stride": 2, "block": 5}, (5, 7)),
    ):
        layer = HaloAttention(16, 24, heads=2, **{"block": 4, "halo": 1, **settings})
        assert layer(x).shape == (2, 24, *shape)
    with pytest.raises(ValueError, match="multiples of block, 4, where fill=False"):
        HaloAttention(16, heads=2, block=4, halo=1, fill=False)(x)


def test_averages_after_all_queries():
    torch.manual_seed(0)
    whole = HaloAttention(16, heads=2, block=4, halo=1)
    layer = HaloAttention(16, stride=2, heads=2, block=4, halo=1, avg_down=True)
    layer.load_state_dict(whole.state_dict())
    x = torch.randn(1, 16, 8, 8)
    expected = torch.nn.functional.avg_pool2d(whole(x), 2)
    assert relative_error(layer(x), expected) < 1e-6


def test_widths_are_timms():
    assert [divisible(n) for n in (1, 12, 20, 42.24, 84.48)] == [8, 16, 24, 40, 88]
    assert HaloAttention(128, heads=8, qk_ratio=0.33).head_dim == 5
    layer = HaloAttention(256, heads=8, block=8, halo=2)
    assert layer.pos_embed.height_rel.shape == (23, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "dim_out must be a multiple of heads, 3"),
        ({"stride": 3}, "stride must be 1 or 2"),
        ({"halo": -1}, "halo must be an int of at least 0"),
        ({"rel_index": "x"}, "rel_index must be 'timm' or 'exact'"),
        ({"fill": 1}, "fill must be True or False"),
    ],
)
def test_what_does_not_fit_is_named(settings, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        HaloAttention(16, **settings)
    assert f"HaloAttention: {message}" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("halo", "low", "high"), [(0, 0.85, 0.93), (1, 0.92, 0.97), (2, 0.99, 1)])
def test_a_halo_is_what_reaches_across_blocks(halo, low, high):
    """The sign of the pixel two columns to the right: beyond the window of 6 - 3 halo of 30."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 1), HaloAttention(16, heads=2, block=8, halo=halo),
        torch.nn.Conv2d(16, 1, 1),
    )  # fmt: skip
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    right = []
    for step in range(440):
        x = torch.randn(8, 1, 32, 32).sign()
        logits, target = net(x)[..., :30], (x[..., 2:] > 0).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= 400:
            right.append(((logits > 0) == (target > 0)).float().mean())
    assert low < torch.stack(right).mean() <= high
